"""Retrieval: means of each ranking, and a few queries with their average precision and first answers, hits and misses marked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.analysis.retrieval import EASY, PROTOCOLS, RELATIONS
from clipray.errors import ClipRayError
from clipray.inputs.relevance import open_relevance, read_relevance
from clipray.inputs.row_index import hash_strings
from clipray.inputs.vector_column import open_vectors
from clipray.job import Column
from clipray.report.label_source import SALT
from clipray.report.ranking import MOST_ROWS, Row, listed, ranked, vectors_of
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
Answers = dict[str, list[tuple[Row, float]]]
Relations = dict[str, dict[str, str]]
"""By query and by picture what the ground truth says."""


@dataclass(frozen=True)
class Example:
    """A query, its figures, and its first answers. ap: None where nothing is known of what should be found."""

    query: Tile
    ap: float | None
    note: str
    answers: list[Tile]


@dataclass(frozen=True)
class Ranking:
    """A table of retrieval figures, or of neighbours.

    Attributes:
        said: by which protocol and distance the examples are. bins: queries by tenths of average precision.
        why: why there are no examples. score: what stands below an answer.
    """

    name: str
    of: str
    said: str
    queries: int
    bins: list[int]
    examples: list[Example]
    why: str = ""
    score: str = "score"


def retrieval_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """Measured rankings first; then lists of neighbours of which nothing was measured."""
    measured, lists = run.of_kind("retrieval"), run.of_kind("neighbours")
    if not measured and not lists:
        return LeftOut(TITLE, "no ranking; a step `search` makes one, `evaluate_retrieval` says how good it is")
    shown = [_measured(run, table, album, examples) for table in measured[:TABLES]]
    used = {str(table.record.inputs.get("input")) for table in measured}
    plain = [table for table in lists if table.name not in used]
    shown += [_plain(run, table, album, examples) for table in plain[:PLAIN]]
    means = [row for table in measured for row in _means(table)]
    values = {"rankings": shown, "means": means, "more": [table.name for table in (*measured[TABLES:], *plain[PLAIN:])]}
    names = tuple(table.name for table in (*measured, *lists) if table not in plain[PLAIN:])
    return Section("retrieval", TITLE, values, names, _headlines(measured))


def _means(table: RunTable) -> list[dict[str, Any]]:
    """A row for each protocol and distance, with its means over the queries."""
    figures = table.record.figures
    groups = list(dict(figures.get("mAP", {})))
    return [
        {"name": table.name, "of": table.record.inputs.get("input"), "group": group.replace("/", ", "),
         "values": [dict(figures.get(name, {})).get(group) for name in MEANS]}
        for group in groups
    ]  # fmt: skip


def _headlines(measured: list[RunTable]) -> tuple[Headline, ...]:
    """The best mean average precision of the protocol that examples are of."""
    found = [
        (value, f"{table.name}, {group.replace('/', ', ')}")
        for table in measured
        for group, value in dict(table.record.figures.get("mAP", {})).items()
        if group.startswith(("medium", "all"))
    ]
    best = max(found, key=lambda each: each[0], default=None)
    return ((f"{best[0]:.3f}", f"mean average precision, {best[1]}"),) if best else ()


def _measured(run: RunTables, table: RunTable, album: Album, examples: int) -> Ranking:
    rows = _figures(table)
    protocol, distance = rows["protocol"][0].as_py(), rows["distance"][0].as_py()
    ap = rows["ap"].to_numpy()
    order = np.lexsort((rows["query_id"].to_numpy().astype(str), ap))
    chosen = rows.take(pa.array(order[np.unique(np.linspace(0, len(order) - 1, QUERIES).round().astype(int))]))
    chosen = chosen.to_pylist()
    bins = np.histogram(ap, BINS, (0, 1))[0].tolist()
    name, of = table.name, str(table.record.inputs.get("input"))
    said = f"protocol {protocol}" + ("" if distance == "given" else f", {distance} distance")
    try:
        answers, kind = _answers(run, table, [row["query_id"] for row in chosen], distance, examples)
        relations = _relations(table, set(answers))
    except ClipRayError as error:
        return Ranking(name, of, said, len(ap), bins, [], f"Its answers are not shown: {error}")
    shown = [_example(album, row, answers.get(row["query_id"], []), relations, protocol, kind) for row in chosen]
    score = {"cosine": "cosine", "l2": "squared distance"}.get(distance, "score")
    return Ranking(name, of, said, len(ap), bins, shown, score=score)


def _figures(table: RunTable) -> pa.Table:
    """The rows of one protocol, `medium` where there is one, and of the first distance."""
    columns = ["query_id", "protocol", "distance", "ap", "first_rank", "positives", "found"]
    rows = pa.concat_tables(list(table.parts(columns)))
    protocols = pc.unique(rows["protocol"]).to_pylist()
    wanted = "medium" if "medium" in protocols else protocols[0]
    rows = rows.filter(pc.equal(rows["protocol"], wanted))
    return rows.filter(pc.equal(rows["distance"], rows["distance"][0]))


def _answers(run: RunTables, table: RunTable, queries: list[str], distance: str, examples: int) -> tuple[Answers, str]:
    """The first answers, and the column that names the queries, where it is known. Raises ClipRayError."""
    record, top = table.record, examples
    of = record.inputs["input"]
    if "neighbours" in record.settings:
        folder = Folder(absolute(of)) if "/" in of else run.output.sub(of)
        lists = _opened(of, folder)
        return listed(lists, queries, top), _kind(str(lists.record.inputs.get("input")), run)
    given = dict(record.settings["input"])
    source = open_vectors(Column(**given) if "path" in given else of, run.output)
    if source.n_samples > MOST_ROWS:
        raise ClipRayError(f"{source.n_samples:,} rows are too many to rank for a page; a step `search` lists them")
    other = dict(record.provenance.get("inputs") or {}).get("queries")
    asked = dict(record.settings.get("queries") or {})
    queried = source if not asked else open_vectors(Column(**asked) if "path" in asked else str(other), run.output)
    vectors = vectors_of(queried, queries)
    found = ranked(source, vectors, top, distance=distance, without_own=not asked) if vectors else {}
    return found, queried.ids[-1]


def _opened(name: str, folder: Folder) -> RunTable:
    found = open_table(name, folder)
    if found is None:
        raise ClipRayError(f"{name} is no finished table")
    return found


def _kind(source: str, run: RunTables) -> str:
    """The column that names the rows of a vector column such as `images.clip`; `id` where that is not known."""
    name = source.rpartition(".")[0]
    columns = next((each.record.columns for each in (*run.tables, *run.texts) if each.name == name), {})
    return next((key for key in ("region_id", "text_id", "image_id") if key in columns), "id")


def _relations(table: RunTable, queries: set[str]) -> Relations:
    """What the ground truth says of these queries. Raises ClipRayError where it cannot be read."""
    given = table.record.settings["ground_truth"]
    truth = read_relevance(open_relevance(given["path"], given["query_id"], given["answer_id"]))
    wanted = pc.is_in(truth.queries, pa.array(sorted(queries), pa.string())).to_numpy(zero_copy_only=False)
    found: Relations = {}
    for pair in np.flatnonzero(wanted[truth.query]).tolist():
        query, answer = truth.queries[truth.query[pair]].as_py(), truth.answers[truth.answer[pair]].as_py()
        found.setdefault(query, {})[answer] = RELATIONS[truth.relation[pair]]
    return found


def _example(
    album: Album, row: dict[str, Any], answers: list[tuple[Row, float]], relations: Relations, protocol: str, kind: str
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
    return Example(album.tile({kind: row["query_id"]}, "", "query"), row["ap"], note, tiles)


def _plain(run: RunTables, table: RunTable, album: Album, examples: int) -> Ranking:
    """Queries that are drawn by their names, with what was found."""
    queries = _draw(table)
    answers = listed(table, queries, examples)
    source = str(table.record.inputs.get("input"))
    kind = _kind(source, run)
    shown = [
        Example(album.tile({kind: query}, "", "query"), None, "",
                [album.tile(ids, f"{score:.3f}") for ids, score in answers[query]])
        for query in queries
    ]  # fmt: skip
    return Ranking(table.name, source, "", int(table.record.inputs.get("rows", 0)), [], shown)


def _draw(table: RunTable) -> list[str]:
    """Queries with the least hashes."""
    drawn: dict[str, int] = {}
    for part in table.parts(["query_id", "rank"]):
        firsts = part.filter(pc.equal(part["rank"], 1))["query_id"]
        hashes = hash_strings(firsts, SALT)
        least = np.argsort(hashes, kind="stable")[:PLAIN_QUERIES]
        drawn |= dict(zip(firsts.take(pa.array(least)).to_pylist(), hashes[least].tolist(), strict=True))
        drawn = dict(sorted(drawn.items(), key=lambda item: item[1])[:PLAIN_QUERIES])
    return list(drawn)
