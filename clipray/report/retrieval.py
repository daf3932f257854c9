"""The section on retrieval: means of each ranking, and the first answers to a few queries, marked as hits and misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from clipray.analysis.retrieval import EASY, PROTOCOLS, RELATIONS, scores
from clipray.errors import ClipRayError
from clipray.inputs.relevance import open_relevance, read_relevance
from clipray.inputs.vector_column import VectorColumn, open_vectors, read_vectors
from clipray.inputs.vector_lookup import Gatherer, open_lookup
from clipray.job import Column
from clipray.report.label_source import draw
from clipray.report.run_tables import RunTable, RunTables, open_table
from clipray.report.section import Headline, LeftOut, Section
from clipray.report.tiles import Album, Tile
from clipray.storage.folder import Folder, absolute

TITLE = "Retrieval"
TABLES = 2  # of measured rankings, with examples
PLAIN = 1  # tables of neighbours that nothing was measured of
QUERIES = 5
PLAIN_QUERIES = 4
BINS = 10
MEANS = ("mAP", "mP@10", "recall@5")
MOST_ROWS = 1_000_000  # that a page ranks
Row = dict[str, str]
"""What names an answer: its identity columns."""
Answers = dict[str, list[tuple[Row, float]]]
"""By query its first answers with their scores."""
Relations = dict[str, dict[str, str]]
"""By query and by image what the ground truth says."""


@dataclass(frozen=True)
class Example:
    """A query and its first answers. ap: average precision; None without ground truth."""

    query: Tile
    ap: float | None
    note: str
    answers: list[Tile]


@dataclass(frozen=True)
class Ranking:
    """A table of retrieval figures, or of neighbours.

    Attributes:
        title: by which protocol and distance the examples are. bins: queries by tenths of average precision.
        why: why there are no examples. score: what stands below an answer.
    """

    name: str
    of: str
    title: str
    queries: int
    bins: list[int]
    examples: list[Example]
    why: str = ""
    score: str = "score"


def retrieval_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """Rankings with ground truth first, then lists of neighbours."""
    measured, lists = run.of_type("retrieval"), run.of_type("neighbours")
    if not measured and not lists:
        return LeftOut(TITLE, "no ranking; a step `search` makes one, `evaluate_retrieval` says how good it is")
    shown = [_measured(run, table, album, examples) for table in measured[:TABLES]]
    used = {str(table.record.inputs.get("input")) for table in measured}
    plain = [table for table in lists if table.name not in used]
    shown += [_plain(run, table, album, examples) for table in plain[:PLAIN]]
    means = [row for table in measured for row in _means(table)]
    values = {"rankings": shown, "means": means, "more": [table.name for table in (*measured[TABLES:], *plain[PLAIN:])]}
    names = tuple(table.name for table in (*measured, *lists) if table not in plain[PLAIN:])
    return Section("retrieval", TITLE, values, names, _headlines(means))


def _means(table: RunTable) -> list[dict[str, Any]]:
    """A row for each protocol and distance, with its means over the queries."""
    figures = table.record.summary
    groups = list(dict(figures.get("mAP", {})))
    return [
        {"name": table.name, "of": table.record.inputs.get("input"), "group": group.replace("/", ", "),
         "values": [dict(figures.get(name, {})).get(group) for name in MEANS]}
        for group in groups
    ]  # fmt: skip


def _headlines(means: list[dict[str, Any]]) -> tuple[Headline, ...]:
    """The best mean average precision, by protocol `medium` or of all positives."""
    rows = [row for row in means if row["group"].startswith(("medium", "all"))]
    best = max(rows, key=lambda row: row["values"][0], default=None)
    return ((f"{best['values'][0]:.3f}", f"mean average precision, {best['name']}, {best['group']}"),) if best else ()


def _measured(run: RunTables, table: RunTable, album: Album, examples: int) -> Ranking:
    rows = _figures(table).sort("ap", "query_id")
    protocol, distance = rows["protocol"][0], rows["distance"][0]
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, QUERIES).round().astype(int))].to_dicts()
    bins = np.histogram(rows["ap"], BINS, (0, 1))[0].tolist()
    title = f"protocol {protocol}" + ("" if distance == "given" else f", {distance} distance")
    score = {"cosine": "cosine", "l2": "squared distance"}.get(distance, "score")
    shown, why = [], ""
    try:
        answers, id_column = _answers(run, table, [row["query_id"] for row in chosen], distance, examples)
        relations = _relations(table, set(answers))
        shown = [
            _example(album, row, answers.get(row["query_id"], []), relations, protocol, id_column) for row in chosen
        ]
    except ClipRayError as error:
        why = f"Its answers are not shown: {error}"
    return Ranking(table.name, str(table.record.inputs.get("input")), title, len(rows), bins, shown, why, score)


def _figures(table: RunTable) -> pl.DataFrame:
    """The rows of one protocol, `medium` where there is one, and of the first distance."""
    rows = table.scan("query_id", "protocol", "distance", "ap", "first_rank", "positives", "found").collect()
    protocol = "medium" if "medium" in rows["protocol"] else rows["protocol"][0]
    rows = rows.filter(pl.col("protocol") == protocol)
    return rows.filter(pl.col("distance") == pl.col("distance").first())


def _answers(run: RunTables, table: RunTable, queries: list[str], distance: str, examples: int) -> tuple[Answers, str]:
    """The first answers, and the column that names the queries, where it is known. Raises ClipRayError."""
    record, top = table.record, examples
    of = record.inputs["input"]
    if "neighbours" in record.settings:
        folder = Folder(absolute(of)) if "/" in of else run.output.sub(of)
        lists = open_table(of, folder)
        if lists is None:
            raise ClipRayError(f"{of} is not a finished table")
        return listed(lists, queries, top), _id_column(str(lists.record.inputs.get("input")), run)
    column = dict(record.settings["input"])
    source = open_vectors(Column(**column) if "path" in column else of, run.output)
    if source.n_samples > MOST_ROWS:
        raise ClipRayError(f"{source.n_samples:,} rows are too many to rank for a page; a step `search` lists them")
    other = dict(record.provenance.get("inputs") or {}).get("queries")
    column = dict(record.settings.get("queries") or {})
    queried = source if not column else open_vectors(Column(**column) if "path" in column else str(other), run.output)
    vectors = vectors_of(queried, queries)
    answers = ranked(source, vectors, top, distance=distance, without_own=not column) if vectors else {}
    return answers, queried.ids[-1]


def _id_column(source: str, run: RunTables) -> str:
    """The column that names the rows of a vector column such as `images.clip`; `id` where that is not known."""
    name = source.rpartition(".")[0]
    columns = next((each.record.columns for each in (*run.tables, *run.known("texts")) if each.name == name), {})
    return next((key for key in ("region_id", "text_id", "image_id") if key in columns), "id")


def _relations(table: RunTable, queries: set[str]) -> Relations:
    """The ground truth of these queries. Raises ClipRayError if it cannot be read."""
    columns = table.record.settings["ground_truth"]
    truth = read_relevance(open_relevance(columns["path"], columns["query_id"], columns["answer_id"]))
    wanted = pc.is_in(truth.queries, pa.array(sorted(queries), pa.string())).to_numpy(zero_copy_only=False)
    relations: Relations = {}
    for pair in np.flatnonzero(wanted[truth.query]).tolist():
        query, answer = truth.queries[truth.query[pair]].as_py(), truth.answers[truth.answer[pair]].as_py()
        relations.setdefault(query, {})[answer] = RELATIONS[truth.relation[pair]]
    return relations


def _example(
    album: Album, row: dict[str, Any], answers: list[tuple[Row, float]], relations: Relations, protocol: str, id_column: str
) -> Example:  # fmt: skip
    known, tiles = relations.get(row["query_id"], {}), []
    positive = [RELATIONS[n] for n in PROTOCOLS.get(protocol, (EASY,))]
    for ids, score in answers:
        relation = next((known[name] for name in reversed(list(ids.values())) if name in known), None)
        mark = "miss" if relation is None else "hit" if relation in positive else "junk"
        tiles.append(album.tile(ids, f"{abs(score):.3f}", mark))
    note = f"{row['positives']} to find"
    note += f", {row['found']} listed" if row["found"] < row["positives"] else ""
    note += f"; the first at rank {row['first_rank']}" if row["first_rank"] is not None else "; none found"
    return Example(album.tile({id_column: row["query_id"]}, "", "query"), row["ap"], note, tiles)


def _plain(run: RunTables, table: RunTable, album: Album, examples: int) -> Ranking:
    """A few queries, drawn by their names, with their answers."""
    queries = _draw(table)
    answers = listed(table, queries, examples)
    source = str(table.record.inputs.get("input"))
    id_column = _id_column(source, run)
    shown = [
        Example(album.tile({id_column: query}, "", "query"), None, "",
                [album.tile(ids, f"{score:.3f}") for ids, score in answers[query]])
        for query in queries
    ]  # fmt: skip
    return Ranking(table.name, source, "", int(table.record.inputs.get("rows", 0)), [], shown)


def _draw(table: RunTable) -> list[str]:
    """The queries with the smallest hashes."""
    queries = table.scan("query_id", "rank").filter(pl.col("rank") == 1).select("query_id")
    drawn = queries.bottom_k(PLAIN_QUERIES, by=draw("query_id")).collect(engine="streaming")
    return drawn.sort(draw("query_id"))["query_id"].to_list()


def listed(table: RunTable, queries: Sequence[str], top: int) -> Answers:
    """The first `top` answers to each query in a table of neighbours, without the query itself."""
    wanted = pl.col("query_id").is_in(queries) & (pl.col("query_id") != pl.col(table.ids[-1]))
    lists = table.scan("query_id", "rank", "score", *table.ids).filter(wanted)
    rows = lists.collect(engine="streaming").sort("rank").group_by("query_id", maintain_order=True).head(top)
    answers: Answers = {query: [] for query in queries}
    for row in rows.iter_rows(named=True):
        answers[row["query_id"]].append(({name: row[name] for name in table.ids}, row["score"]))
    return answers


def vectors_of(source: VectorColumn, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The vectors (d,) of these rows, by their names; a row that is not there is left out."""
    vectors = Gatherer(open_lookup(source))(pa.chunked_array([names], pa.string())).to_numpy(zero_copy_only=False)
    return {name: vector for name, vector in zip(names, vectors, strict=True) if vector is not None}


def ranked(
    source: VectorColumn, queries: dict[str, np.ndarray], top: int, *, distance: str, without_own: bool
) -> Answers:
    """The `top` rows nearest to each query, the nearest first.

    Args:
        queries: vectors (d,) by name. distance: `cosine`, or `l2`, of which the negative is the score.
        without_own: leave out the row of the query's own name.
    """
    names, q = list(queries), np.stack(list(queries.values())).astype(np.float64)
    best: list[list[tuple[float, str, Row]]] = [[] for _ in names]
    for row_group in source.row_groups:
        ids, x = read_vectors(source, row_group)
        k = min(top + 1, len(x))
        for n, near in enumerate(scores(q, x, [distance])[distance]):
            rows = np.argpartition(-near, k - 1)[:k]
            entries = zip(near[rows].tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True)
            kept = [(score, row[source.ids[-1]], row) for score, row in entries]
            kept = [entry for entry in kept if not (without_own and entry[1] == names[n])]
            best[n] = sorted([*best[n], *kept], key=lambda entry: (-entry[0], entry[1]))[:top]
    return {
        name: [({key: row[key] for key in source.ids}, score) for score, _, row in best[n]]
        for n, name in enumerate(names)
    }
