"""How many rows of a vector column stand before each positive of each query, in two passes and little memory.

The first pass finds the rows that the ground truth names and keeps their vectors. With those, the score that a row needs
to stand before a positive is known, and the second pass only counts: what returns from a task is a number for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.analysis.retrieval import count_from, scores, thresholds
from clipray.errors import SchemaError
from clipray.inputs.relevance import GroundTruth
from clipray.inputs.vector_column import VectorColumn, read_finite, read_ids
from clipray.steps.base.shard_writer import map_row_groups
from clipray.steps.base.step import RunContext
from clipray.storage.parquet import RowGroup

TASK_ROWS = 131_072
QUERY_BLOCK, ROW_BLOCK = 512, 8_192  # of one product: 32 MiB of scores


@dataclass(frozen=True, eq=False)
class RankingQuery:
    """What a task needs to count.

    Attributes:
        queries: (q, d) float64. bounds: (q + 1,) int64: where the positives of each query begin.
        starts: by distance (m,) float64, from which score on a row stands before each positive.
        names: (n,) ids of the rows that are not counted for some query; hidden, hidden_bounds: for which, (n + 1,) int64.
    """

    queries: np.ndarray
    bounds: np.ndarray
    starts: dict[str, np.ndarray]
    names: pa.Array
    hidden: np.ndarray
    hidden_bounds: np.ndarray


def negatives_before(
    source: VectorColumn,
    queries: VectorColumn | None,
    truth: GroundTruth,
    distances: Sequence[str],
    run: RunContext,
    step: str,
) -> dict[str, np.ndarray]:
    """By distance (m,) int64: the rows of `source` that are not named for a query and stand before each of its positives.

    Args:
        queries: another column with the queries; None takes them from `source` and leaves each out of its own ranking.
        truth: m of its pairs are positive, in this order.

    Raises:
        SchemaError: an id that is not there, or twice; vectors that are not finite.
    """
    self_queries = queries is None
    ids = pa.concat_arrays([truth.answers, truth.queries]) if self_queries else truth.answers
    ids = ids.unique()
    known, rows_of = gather(source, ids, run, step)
    answer = pc.index_in(truth.answers, ids).to_numpy()
    truth.refuse_unknown(truth.answers, known[answer], "images", source.name)
    if queries is None:
        at = pc.index_in(truth.queries, ids).to_numpy()
        truth.refuse_unknown(truth.queries, known[at], "queries", source.name)
        asking = rows_of[at]
    else:
        known, asking = gather(queries, truth.queries, run, step)
        truth.refuse_unknown(truth.queries, known, "queries", queries.name)
    asked = _asked(truth, ids, asking, rows_of[answer], distances, self_queries=self_queries)
    return _count(source, asked, run, step)


def gather(source: VectorColumn, ids: pa.Array, run: RunContext, step: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of these distinct ids is there, (n,) bool, and its vector, (n, d) float64. Raises SchemaError."""
    times, x = np.zeros(len(ids), np.int64), np.zeros((len(ids), source.n_features))
    phase = f"reading what is named of {source.name}"
    for at, rows in map_row_groups(_named, source, TASK_ROWS, run, step, phase, ids):
        np.add.at(times, at, 1)
        x[at] = rows
    twice = np.flatnonzero(times > 1)
    if len(twice):
        raise SchemaError(
            f"{source.name}: {source.ids[-1]} {ids[int(twice[0])].as_py()!r} stands in {times[twice[0]]} rows; "
            "it should stand in one: drop the others"
        )
    return times > 0, x


def _named(item: tuple[VectorColumn, list[RowGroup]], ids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Places among `ids` (k,) and vectors (k, d) of the rows that are named there."""
    source, group = item
    places, parts = [np.zeros(0, np.int64)], [np.zeros((0, source.n_features))]
    for row_group in group:
        at = pc.index_in(read_ids(source, row_group), ids)
        rows = np.flatnonzero(at.is_valid())
        if len(rows):
            places.append(at.take(pa.array(rows)).to_numpy().astype(np.int64))
            parts.append(read_finite(source, row_group)[1][rows].astype(np.float64))
    return np.concatenate(places), np.concatenate(parts)


def _asked(
    truth: GroundTruth,
    ids: pa.Array,
    asking: np.ndarray,
    answers: np.ndarray,
    distances: Sequence[str],
    *,
    self_queries: bool,
) -> RankingQuery:
    """asking: (q, d) vectors of the queries. answers: (n, d) of `truth.answers`."""
    positive = truth.positive
    query, answer = truth.query[positive], truth.answer[positive]
    pairs = asking[query], answers[answer]
    starts = {name: thresholds(*pairs, name) for name in distances}
    named = pc.index_in(truth.answers, ids).to_numpy()[truth.answer]
    by, who = named, truth.query
    if self_queries:  # a query is hidden from itself
        by = np.concatenate([by, pc.index_in(truth.queries, ids).to_numpy()])
        who = np.concatenate([who, np.arange(len(truth.queries))])
    order = np.argsort(by, kind="stable")
    bounds, hidden_bounds = bounds_of(query, len(truth.queries)), bounds_of(by, len(ids))
    return RankingQuery(asking, bounds, starts, ids, who[order], hidden_bounds)


def bounds_of(values: np.ndarray, n: int) -> np.ndarray:
    """(n + 1,) where the runs of 0, 1, … n - 1 begin in the sorted values, and the end."""
    return np.concatenate([[0], np.cumsum(np.bincount(values, minlength=n))])


def _count(source: VectorColumn, asked: RankingQuery, run: RunContext, step: str) -> dict[str, np.ndarray]:
    counts = {name: np.zeros(int(asked.bounds[-1]), np.int64) for name in asked.starts}
    for part in map_row_groups(_count_group, source, TASK_ROWS, run, step, "counting", asked):
        for name, values in part.items():
            counts[name] += values
    return counts


def _count_group(item: tuple[VectorColumn, list[RowGroup]], asked: RankingQuery) -> dict[str, np.ndarray]:
    source, group = item
    counts = {name: np.zeros(int(asked.bounds[-1]), np.int64) for name in asked.starts}
    for row_group in group:
        ids, x = read_finite(source, row_group)
        at = pc.index_in(ids[source.ids[-1]].combine_chunks(), asked.names)
        named = pc.fill_null(at, -1).to_numpy()
        for start in range(0, len(x), ROW_BLOCK):
            _count_block(asked, x[start : start + ROW_BLOCK], named[start : start + ROW_BLOCK], counts)
    return counts


def _count_block(asked: RankingQuery, x: np.ndarray, named: np.ndarray, counts: dict[str, np.ndarray]) -> None:
    """Add the rows x (n, d) to the counts. named: (n,) place among `asked.names`, or -1."""
    rows = np.flatnonzero(named >= 0)
    hiders = [asked.hidden[slice(*asked.hidden_bounds[[n, n + 1]])] for n in named[rows]]
    who = np.concatenate([*hiders, np.zeros(0, np.int64)]).astype(np.int64)
    where = np.repeat(rows, [len(h) for h in hiders])
    for first in range(0, len(asked.queries), QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, len(asked.queries))
        mine = (who >= first) & (who < last)
        for name, values in scores(asked.queries[first:last], x, list(asked.starts)).items():
            values[who[mine] - first, where[mine]] = -np.inf
            for q in range(first, last):
                positives = slice(*asked.bounds[[q, q + 1]])
                counts[name][positives] += count_from(values[q - first], asked.starts[name][positives])
