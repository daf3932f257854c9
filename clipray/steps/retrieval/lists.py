"""How many entries of a ranked list stand before each positive of its query; the lists are a table, as `search` writes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.errors import SchemaError
from clipray.inputs.key_index import hash_strings, seed_of
from clipray.inputs.relevance import GroundTruth
from clipray.storage.folder import Folder

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
    counts. Holds 32 bytes of each entry of the queries' lists.

    Args:
        truth: m of its pairs are positive, in this order.

    Raises:
        SchemaError: a query has no list.
    """
    query, rank, answer, keys = _entries(lists, truth)
    listed = np.zeros(len(truth.queries), bool)
    listed[query] = True
    truth.refuse_unknown(truth.queries, listed, "queries", lists.name)
    order = np.lexsort((rank, keys, query))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(query[order]) != 0) | (keys[order][1:] != keys[order][:-1])
    order = order[first]
    order = order[np.lexsort((rank[order], query[order]))]
    pair = _pairs(truth, query[order], answer[order])
    unnamed = np.cumsum(pair == NOT_FOUND)
    starts = np.searchsorted(query[order], np.arange(len(truth.queries)))
    before = (
        unnamed - np.concatenate([[0], unnamed])[starts][query[order]]
    )  # in the own list, and none is itself unnamed
    ranks = np.full(len(truth.query), NOT_FOUND, np.int64)
    ranks[pair[pair != NOT_FOUND]] = before[pair != NOT_FOUND]
    return ranks[truth.positive]


def _entries(lists: Lists, truth: GroundTruth) -> tuple[np.ndarray, ...]:
    """Of the queries' lists: number of the query, rank, number of the image or NOT_FOUND, hash of the image."""
    parts: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64),) * 3 + (np.zeros(0, np.uint64),)]
    for part in tables.iter_table(lists.folder.url, ["query_id", "rank", lists.answer_id]):
        kept = part.filter(
            pc.and_(pc.is_in(part["query_id"], truth.queries), pc.not_equal(part["query_id"], part[lists.answer_id]))
        )
        numbers = [
            pc.fill_null(pc.index_in(kept[name], values), NOT_FOUND).to_numpy().astype(np.int64)
            for name, values in (("query_id", truth.queries), (lists.answer_id, truth.answers))
        ]
        rank = kept["rank"].to_numpy().astype(np.int64)
        parts.append((numbers[0], rank, numbers[1], hash_strings(kept[lists.answer_id], SEED)))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _pairs(truth: GroundTruth, query: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """(n,) int64: the pair of the ground truth that an entry is, or NOT_FOUND."""
    n = len(truth.answers)
    pairs = pc.index_in(pa.array(query * n + answer), pa.array(truth.query * n + truth.answer))
    return np.where(answer == NOT_FOUND, NOT_FOUND, pc.fill_null(pairs, NOT_FOUND).to_numpy())
