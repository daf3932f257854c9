"""How many entries of a ranked list stand before each positive of its query; the lists are a table, as `search` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from clipray import tables
from clipray.errors import SchemaError
from clipray.inputs.key_index import hashed, seed_of
from clipray.inputs.relevance import GroundTruth
from clipray.storage.folder import Folder
from clipray.tables.scan import scan_table

SEED = seed_of("lists")
NOT_FOUND = -1


@dataclass(frozen=True)
class Lists:
    """An opened table of ranked lists; `answer_id`: the column that names what is listed."""

    name: str
    folder: Folder
    record: tables.Record
    answer_id: str


def open_lists(name: str, output: Folder, answer_id: str) -> Lists:
    """Open a table with `query_id`, `rank` and `answer_id`, or `image_id` where there is no such column.

    Raises:
        SchemaError: it is not finished, or holds no ranked lists.
    """
    folder = output.named(name)
    record = tables.finished(folder, f"neighbours {name}")
    answer_id = answer_id if answer_id in record.columns else "image_id"
    wanted = ("query_id", "rank", answer_id)
    missing = [column for column in wanted if column not in record.columns]
    if missing:
        raise SchemaError(
            f"neighbours {name}: no column {missing[0]!r} in {folder.url}; expected a row for each query and rank: {', '.join(wanted)}"
        )
    return Lists(name, folder, record, answer_id)


def negatives_listed(lists: Lists, truth: GroundTruth) -> np.ndarray:
    """(m,) int64: the images that are not named for a query and are listed before each of its positives, or NOT_FOUND.

    A query's own entry is left out. Of an image that is listed several times, say by several regions, the first entry
    counts. Holds four numbers of each entry of the queries' lists.

    Args:
        truth: m of its pairs are positive, in this order.

    Raises:
        SchemaError: a query has no list.
    """
    entries = _entries(lists, truth)
    truth.refuse_unknown(truth.queries, np.isin(np.arange(len(truth.queries)), entries["query"]), "queries", lists.name)
    pairs = pl.DataFrame({"query": truth.query, "answer": truth.answer}).with_row_index("pair")
    before = (
        entries.sort("query", "rank")
        .unique(["query", "image"], keep="first", maintain_order=True)
        .join(pairs, on=["query", "answer"], how="left", maintain_order="left")
        .select("pair", before=pl.col("pair").is_null().cum_sum().over("query"))
        .drop_nulls("pair")
    )
    ranks = np.full(len(pairs), NOT_FOUND, np.int64)
    ranks[before["pair"].to_numpy()] = before["before"].to_numpy()
    return ranks[truth.positive]


def _entries(lists: Lists, truth: GroundTruth) -> pl.DataFrame:
    """Of the queries' lists: number of the query, rank, number of the answer or null, hash of the image."""
    queries, answers = (
        pl.LazyFrame({"id": pl.Series(ids), name: np.arange(len(ids))})
        for name, ids in (("query", truth.queries), ("answer", truth.answers))
    )
    columns = ["query_id", "rank", lists.answer_id]
    return (
        scan_table(lists.folder.url, columns)
        .select("rank", query_id=pl.col("query_id").cast(pl.String), id=pl.col(lists.answer_id).cast(pl.String))
        .filter(pl.col("query_id") != pl.col("id"))
        .join(queries, left_on="query_id", right_on="id")
        .join(answers, on="id", how="left")
        .select("query", "rank", "answer", image=hashed("id", SEED))
        .collect(engine="streaming")
    )
