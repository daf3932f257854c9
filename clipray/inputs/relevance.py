"""What should be found: which images are relevant to a query and which are junk, read from Parquet and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipray.analysis.retrieval import EASY, JUNK, PROTOCOLS, RELATIONS
from clipray.errors import ManifestError, SchemaError, listed
from clipray.inputs.parquet_files import (
    IDS,
    expand_parquet,
    is_id,
    is_text,
    numbered,
    read_footer,
    read_texts,
    with_rows,
)
from clipray.storage.folder import absolute, file_versions
from clipray.tables.digests import digest_of


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Pairs of a query and an image, sorted by query in the order of the file.

    Attributes:
        source: its path. queries, answers: (n,) string arrays of distinct ids.
        query, answer: (m,) int64 into these. relation: (m,) int8 into `RELATIONS`.
        graded: whether the file says how relevant an image is.
    """

    source: str
    queries: pa.Array
    answers: pa.Array
    query: np.ndarray
    answer: np.ndarray
    relation: np.ndarray
    graded: bool

    @property
    def protocols(self) -> dict[str, tuple[int, ...]]:
        """Relations that are positive, by protocol."""
        return dict(PROTOCOLS) if self.graded else {"all": (EASY,)}

    @property
    def positive(self) -> np.ndarray:
        """(m,) bool: pairs that are positive in some protocol."""
        return self.relation != JUNK

    def without_own(self) -> GroundTruth:
        """Without the pairs of a query and itself."""
        at = pc.fill_null(pc.index_in(self.queries, self.answers), -1).to_numpy()
        kept = at[self.query] != self.answer
        return replace(self, query=self.query[kept], answer=self.answer[kept], relation=self.relation[kept])

    def refuse_unknown(self, ids: pa.Array, known: np.ndarray, what: str, where: str) -> None:
        """Raises SchemaError where some of `ids` are not `known` (n,) bool: how many, and the first of them."""
        unknown = ids.filter(pa.array(~known)).to_pylist()
        if unknown:
            raise SchemaError(
                f"{self.source}: {what} that are not in {where}: {listed(unknown)}; drop their rows or add the images"
            )


@dataclass(frozen=True)
class RelevanceSource:
    """A ground truth's files and columns, before it is read."""

    path: str
    urls: tuple[str, ...]
    query_id: str
    answer_id: str
    graded: bool

    @property
    def identity(self) -> dict[str, Any]:
        return {"path": absolute(self.path), "query_id": self.query_id, "answer_id": self.answer_id}

    @property
    def digest(self) -> str:
        """Of the files themselves."""
        return digest_of(file_versions(self.urls))


def open_relevance(path: str, query_id: str | None, answer_id: str) -> RelevanceSource:
    """Find a ground truth's files and look at their columns.

    Args:
        query_id: None takes `query_id`, or `text_id` where there is no such column.

    Raises:
        ManifestError: nothing there, not Parquet, a column missing or not of strings.
    """
    try:
        urls = expand_parquet(absolute(path))
    except ManifestError as error:
        raise ManifestError(
            f"{path}: no ground truth there: expected Parquet with query_id, image_id and perhaps relation; "
            "`clipray ground-truth` makes it of published files"
        ) from error
    files = with_rows([read_footer(url) for url in urls])
    names = files[0].schema.names
    query_id = query_id or next((name for name in ("query_id", "text_id") if name in names), "query_id")
    graded = "relation" in names
    for file in files:
        for name in (query_id, answer_id, *(["relation"] if graded else [])):
            file.refuse_without([name], "for the ground truth: ", ManifestError)
            column_type = file.schema.field(name).type
            fits, wanted = (is_text, "strings") if name == "relation" else (is_id, IDS)
            if not fits(column_type):
                raise ManifestError(f"{file.url}: column {name!r} is {column_type}; expected {wanted}")
    return RelevanceSource(path, tuple(urls), query_id, answer_id, graded)


def read_relevance(source: RelevanceSource) -> GroundTruth:
    """Read a ground truth. Equal rows count once.

    Raises:
        SchemaError: no rows, a relation that is none, or two for the same pair.
        ManifestError: a null, or a string that is not UTF-8.
    """
    names = [source.query_id, source.answer_id, *(["relation"] if source.graded else [])]
    rows = read_texts(with_rows([read_footer(url) for url in source.urls]), names, names[:2])
    if not len(rows):
        raise SchemaError(f"{source.path}: the ground truth has no rows")
    relation = _relations(source, rows.columns[2]) if source.graded else np.full(len(rows), EASY, np.int8)
    (queries, query), (answers, answer) = (numbered([column]) for column in rows.columns[:2])
    order = np.unique(np.stack([query, answer, relation], axis=1).astype(np.int64), axis=0)
    twice = np.flatnonzero((order[1:, :2] == order[:-1, :2]).all(axis=1))
    if len(twice):
        q, a, first = order[twice[0]]
        second = RELATIONS[order[twice[0] + 1, 2]]
        raise SchemaError(
            f"{source.path}: {answers[a].as_py()!r} is both {RELATIONS[first]} and {second} for {queries[q].as_py()!r}"
        )
    return GroundTruth(
        source.path, queries, answers, order[:, 0], order[:, 1], order[:, 2].astype(np.int8), source.graded
    )


def _relations(source: RelevanceSource, column: pa.ChunkedArray) -> np.ndarray:
    codes = pc.index_in(column, pa.array(RELATIONS))
    if codes.null_count:
        strange = pc.unique(column.filter(codes.is_null())).to_pylist()
        raise SchemaError(f"{source.path}: relation {listed(strange)}: expected one of {', '.join(RELATIONS)}")
    return codes.to_numpy().astype(np.int8)
