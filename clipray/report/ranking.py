"""The first answers to a few queries: from lists that the run wrote, or ranked anew, exactly, in one pass over the vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from clipray.analysis.normalize import l2_normalize
from clipray.inputs.vector_column import VectorColumn, read_vectors
from clipray.inputs.vector_lookup import Gatherer, open_lookup
from clipray.report.run_tables import RunTable

MOST_ROWS = 1_000_000  # that a page ranks
Row = dict[str, str]
"""What names an answer: its identity columns."""


def listed(table: RunTable, queries: Sequence[str], top: int) -> dict[str, list[tuple[Row, float]]]:
    """The first `top` answers of each query in a table of neighbours, with their scores; its own entry is left out."""
    wanted = pl.col("query_id").is_in(queries) & (pl.col("query_id") != pl.col(table.ids[-1]))
    lists = table.scan("query_id", "rank", "score", *table.ids).filter(wanted)
    rows = lists.collect(engine="streaming").sort("rank").group_by("query_id", maintain_order=True).head(top)
    answers: dict[str, list[tuple[Row, float]]] = {query: [] for query in queries}
    for row in rows.iter_rows(named=True):
        answers[row["query_id"]].append(({name: row[name] for name in table.ids}, row["score"]))
    return answers


def vectors_of(source: VectorColumn, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The vectors (d,) of these rows, by their names; a row that is not there is left out."""
    vectors = Gatherer(open_lookup(source))(pa.chunked_array([names], pa.string())).to_numpy(zero_copy_only=False)
    return {name: vector for name, vector in zip(names, vectors, strict=True) if vector is not None}


def ranked(
    source: VectorColumn, queries: dict[str, np.ndarray], top: int, *, distance: str, without_own: bool
) -> dict[str, list[tuple[Row, float]]]:
    """The `top` rows nearest to each query, the nearest first.

    Args:
        queries: vectors (d,) by name. distance: `cosine`, or `l2`, of which the negative is the score.
        without_own: leave out the row of the query's own name.
    """
    names = list(queries)
    q = np.stack([queries[name] for name in names]).astype(np.float64)
    q = l2_normalize(q).astype(np.float64) if distance == "cosine" else q
    best: list[list[tuple[float, str, Row]]] = [[] for _ in names]
    for row_group in source.row_groups:
        ids, x = read_vectors(source, row_group)
        scores = _scores(q, x, distance)
        k = min(top + 1, len(x))
        for n, name in enumerate(names):
            rows = np.argpartition(-scores[n], k - 1)[:k]
            entries = zip(scores[n][rows].tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True)
            kept = [(score, row[source.ids[-1]], row) for score, row in entries]
            kept = [entry for entry in kept if not (without_own and entry[1] == name)]
            best[n] = sorted([*best[n], *kept], key=lambda entry: (-entry[0], entry[1]))[:top]
    return {
        name: [({key: row[key] for key in source.ids}, score) for score, _, row in best[n]]
        for n, name in enumerate(names)
    }


def _scores(q: np.ndarray, x: np.ndarray, distance: str) -> np.ndarray:
    """(q, n), the larger the nearer."""
    if distance == "cosine":
        return q @ l2_normalize(x).astype(np.float64).T
    x = x.astype(np.float64)
    return -((q**2).sum(axis=1)[:, None] - 2 * q @ x.T + (x**2).sum(axis=1))
