"""An open index of a run with the model that encodes queries, which answers many queries from many threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipray import tables
from clipray.analysis.filtered_search import first_kept
from clipray.analysis.normalize import SHORTEST, l2_normalize
from clipray.errors import JobError
from clipray.inputs.index_reader import index_record, open_index, refuse_stale_index
from clipray.job import Model
from clipray.queries.answer import Box, Hit
from clipray.queries.query_encoder import QueryEncoder
from clipray.queries.row_columns import RowColumns
from clipray.queries.row_numbers import RowNumbers
from clipray.queries.run_columns import Column
from clipray.storage.folder import Folder, absolute
from clipray.storage.uris import is_relative


@dataclass(frozen=True)
class Part:
    """A part of a query: words, an image or a row, one of them.

    Attributes:
        weight: negative for what the answers should not be like.
        image: bytes of an image file, or its path or URL. like: the id of an indexed row.
    """

    weight: float = 1.0
    text: str | None = None
    image: bytes | str | None = None
    like: str | None = None


class Searcher:
    """An index of the run at `run`. Opening it loads no model, and no torch.

    Args:
        index: the index's table; by default the only one. by_region: the only one over regions.
        model: that of the index, where its record does not say where to find it.
        precision: of the model, as of an `Encoder`.

    Attributes:
        name: of the index. metric: `cosine`, `dot` or `l2`.
        encoder: of queries that are no rows of the index.
        columns: of the run's tables that describe the indexed rows.

    Raises:
        JobError: no such index, or more than one.
        SchemaError: the index is stale.
    """

    def __init__(
        self, run: str, index: str | None = None, *, by_region: bool = False, model: Model | None = None,
        precision: str = "auto",
    ) -> None:  # fmt: skip
        self.output = Folder(absolute(run))
        self.name = index or _only_index(self.output, by_region)
        record = index_record(self.name, self.output.sub(self.name))
        refuse_stale_index(self.name, record, self.output)
        self._opened = open_index(self.name, self.output.sub(self.name))
        self.metric = self._opened.metric
        self.encoder = QueryEncoder(self.name, record, model, precision)
        self.columns = RowColumns(self.output, self._opened.ids)

    @property
    def n_rows(self) -> int:
        return len(self._opened.ids)

    @property
    def is_by_region(self) -> bool:
        return "region_id" in self._opened.ids.column_names

    @property
    def can_encode(self) -> bool:
        """Whether words and new images can be compared with the indexed vectors."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why they cannot; "" where they can."""
        return self.encoder.why_not

    @property
    def is_ready(self) -> bool:
        """Whether the next query need not wait for the model."""
        return not self.can_encode or self.encoder.is_ready

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d) float32 of unit length, of n texts.

        Raises:
            SchemaError: `why_not`. ModelError, JobError: the model cannot be had, is another, or has no text tower.
        """
        return self.encoder.encode_texts(texts)

    def encode_images(self, images: Sequence[bytes | str]) -> np.ndarray:
        """(n, d) float32 of unit length, of n images: bytes of image files, or their paths or URLs.

        Raises:
            SchemaError: `why_not`. ModelError, JobError: the model cannot be had, or is another.
            ManifestError: an image cannot be had or decoded, with the reason.
        """
        return self.encoder.encode_images(images)

    @property
    def row_numbers(self) -> RowNumbers:
        """Of the indexed rows, by the id that names them."""
        return self.columns.numbers_by(self._opened.ids.column_names[-1])

    def vector_of(self, row_id: str) -> np.ndarray:
        """The vector (d,) float32 of an indexed row, as the index stores it. Raises JobError: there is no such row."""
        number = self.row_numbers.number(row_id)
        if number is None:
            there = self.row_numbers.ids[0].as_py() if self.n_rows else ""
            raise JobError(f"{row_id}: index {self.name} has no such row; it has {there!r}, …")
        return self._opened.vector(number)

    def vector(
        self, parts: Sequence[Part], encode_texts: Callable[[list[str]], np.ndarray] | None = None
    ) -> np.ndarray:
        """The vector (d,) float32 of a query.

        Several parts are mixed: their unit vectors are summed by weight, and the sum is made as long as they are on
        average.

        Args:
            encode_texts: what encodes words in place of `encode_texts`, such as in batches with those of other queries.

        Raises:
            JobError: no parts, one that is not of one sort, or parts that cancel each other out; else as `encode_texts`,
            `encode_images` and `vector_of`.
        """
        if not parts or any(sum(v is not None for v in (p.text, p.image, p.like)) != 1 for p in parts):
            raise JobError("expected a query of words, an image or a row's id")
        texts = [part.text for part in parts if part.text is not None]
        images = [part.image for part in parts if part.image is not None]
        of_texts = iter((encode_texts or self.encode_texts)(texts) if texts else ())
        of_images = iter(self.encode_images(images) if images else ())
        vectors = [
            next(of_texts) if part.text is not None
            else next(of_images) if part.image is not None
            else self.vector_of(str(part.like))
            for part in parts
        ]  # fmt: skip
        if len(parts) == 1 and parts[0].weight == 1:
            return vectors[0]
        return _mixture(np.stack(vectors), np.array([part.weight for part in parts]))

    def search(
        self, vectors: np.ndarray, top: int, mask: np.ndarray | None = None, leave_out: Sequence[str] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest rows of each query.

        Args:
            vectors: (q, d) or (d,) float32. mask: (n_rows,) bool, the rows that may answer. leave_out: ids that may not.

        Returns:
            Scores (q, t) float32 and numbers (q, t) int64, the best first, t <= top; a number is -1 where the index
            finds no more.

        Raises:
            SchemaError: vectors of another width.
        """
        queries = np.atleast_2d(vectors)
        numbers_out = [self.row_numbers.number(row_id) for row_id in leave_out]
        out = [number for number in numbers_out if number is not None]
        if mask is None:
            scores, numbers = self._opened.search(queries, top + len(out))
            return first_kept(scores, numbers, ~np.isin(numbers, [-1, *out]), top) if out else (scores, numbers)
        if out:
            mask = mask.copy()
            mask[out] = False
        return self._opened.search(queries, top, mask)

    def hits(
        self, scores: np.ndarray, numbers: np.ndarray, columns: Sequence[str] = (), *, with_uri: bool = True
    ) -> list[Hit]:
        """The answers to one query.

        Args:
            scores, numbers: (t,) of `search`; rows of number -1 are left out.
            columns: whose values hits should have; see `RowColumns`.
            with_uri: whether they should have their URI; those of all rows are held then.

        Raises:
            JobError: there is no such column.
        """
        rows = numbers[numbers >= 0].tolist()
        ids = [self._opened.ids.slice(row, 1).to_pylist()[0] for row in rows]  # `take` imports pandas, in 0.2 s
        regions = [names.get("region_id") for names in ids]
        uris, boxes = self._uris(rows) if with_uri else [""] * len(rows), self._boxes(rows)
        values = self.columns.rows(rows, columns) if columns else [{} for _ in rows]
        return [
            Hit(n + 1, _image_of(ids[n]), float(score), uris[n], regions[n], boxes[n], values[n])
            for n, score in enumerate(scores[numbers >= 0])
        ]

    def _uris(self, rows: list[int]) -> list[str]:
        """URIs of images from the run's first table of images. Relative ones are resolved against the manifest."""
        column = self._column("images", "uri")
        if column is None:
            return [""] * len(rows)
        record = tables.finished(self.output.sub(column.table), column.table)
        home = os.path.dirname(str((record.inputs.get("manifest") or [""])[0]))
        uris = self.columns.values(column, rows)
        return [f"{home}/{uri}" if uri and is_relative(uri) else uri or "" for uri in uris]

    def _boxes(self, rows: list[int]) -> list[Box | None]:
        column = self._column("regions", "box_xyxy") if self.is_by_region else None
        return [None] * len(rows) if column is None else [tuple(box) for box in self.columns.values(column, rows)]

    def _column(self, table_type: str, source: str) -> Column | None:
        """That of the table that was indexed, or of the first one of this type."""
        indexed = str(self._opened.record.inputs["input"]).rpartition(".")[0]
        columns = [c for c in self.columns.columns.all.values() if (c.table_type, c.source) == (table_type, source)]
        return min(columns, key=lambda column: column.table != indexed, default=None)


def _image_of(ids: dict[str, Any]) -> str:
    return str(ids.get("image_id", next(iter(ids.values()))))


def _only_index(output: Folder, by_region: bool) -> str:
    records = {name: tables.read_record(output.sub(name)) for name in output.folders()}
    names = [n for n, r in records.items() if r and r.table == "index" and ("region_id" in r.columns) == by_region]
    if len(names) == 1:
        return names[0]
    if names:
        raise JobError(f"{output.url}: there are several: {', '.join(names)}; choose one with --index")
    what = "index over regions" if by_region else "index"
    raise JobError(f"{output.url}: no finished {what} there; a job's step `index: {{input: images.clip}}` makes one")


def _mixture(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(d,) float32 of `vectors` (p, d) by weights (p,); see `Searcher.vector`."""
    total = weights.astype(np.float32) @ l2_normalize(vectors)
    if np.linalg.norm(total) < 1e-6 * np.abs(weights).sum():
        raise JobError("the parts of the query cancel each other out; expected a sum that is not zero")
    length = max(float(np.linalg.norm(vectors, axis=1).mean()), SHORTEST)
    return l2_normalize(total[None])[0] * np.float32(length)
