"""Step `search`: queries -> the `neighbours` table, the rows of an index that are nearest to each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import averaged, expanded
from clipray.errors import JobError, SchemaError
from clipray.inputs.index_reader import OpenIndex, opened_in_worker, ready_index
from clipray.inputs.vector_column import IDENTITIES, open_vectors
from clipray.job import Search
from clipray.queries.row_columns import RowColumns
from clipray.queries.run_columns import RunColumns
from clipray.queries.where import parse_where
from clipray.steps.base.shard_writer import write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.storage.folder import Folder, split
from clipray.tables.digests import Digest, files_digest, plain

AT_ONCE = 1_024  # queries


@dataclass(frozen=True)
class SearchStep(VectorStep[Search]):
    """A `Step`; see `VectorStep`: of the queries, each of which gets up to `top` rows.

    Attributes:
        index, regions: records of the indexes. filtered_by: records of the tables that `where` reads, by name.
    """

    table_type: ClassVar[str] = "neighbours"
    row_for_row: ClassVar[bool] = False

    index: tables.Record
    regions: tables.Record | None
    filtered_by: Mapping[str, tables.Record] = field(default_factory=dict)

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        rerank = self.regions.fingerprint if self.regions else None
        filtered_by = {name: record.fingerprint for name, record in self.filtered_by.items()}
        filters = {"filtered_by": filtered_by} if self.settings.where is not None else {}
        return {"queries": self.source.identity, "index": self.index.fingerprint, "rerank": rerank, **filters}

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {
            "queries": {"name": self.source.name, "digest": self.digest.split("-")[0]},
            "index": {"name": self.settings.index, "files": self.index.provenance["sizes"]},
            "metric": self.index.provenance["metric"],
            **({"where": self._filter_provenance} if self.settings.where is not None else {}),
        }

    @property
    def _filter_provenance(self) -> dict[str, Any]:
        digests = {name: files_digest(record.files) for name, record in self.filtered_by.items()}
        return {"filter": self.settings.where, "tables": {n: d.content or d.before for n, d in digests.items()}}

    @property
    def inputs_digest(self) -> Digest:
        """Of the queries' files, of those that the indexes were made of, and of the tables that `where` reads."""
        indexes = [plain(r.inputs["digest"]) for r in (self.index, self.regions) if r]
        filters = [files_digest(record.files) for record in self.filtered_by.values()]
        digests = [self.source.digest, *indexes, *filters]
        is_known = all(digest.content for digest in digests)
        return Digest("-".join(d.before for d in digests), "-".join(d.content for d in digests) if is_known else "")

    @property
    def answers(self) -> list[str]:
        """Identity columns of an answer."""
        names = [name for name in IDENTITIES if name in self.index.columns]
        return [*names, "region_id"] if self.regions and "region_id" not in names else names

    @property
    def schema(self) -> pa.Schema:
        fields = [pa.field(name, pa.string(), nullable=False) for name in self.answers]
        return pa.schema([*tables.arrow_schema("neighbours"), *fields])

    @property
    def description(self) -> str:
        index = f"{self.settings.index}, {self.index.summary['type']} of {self.index.rows}"
        return f"{self.total} queries from {self.source.name} in {index}"

    def make(self, run: RunContext) -> Outcome:
        """Search for what is missing. Raises SchemaError: vectors that are not finite."""
        self.begin()
        return Outcome(write_rows(self, _answers, self, run, "searching", at_once=AT_ONCE))


def _answers(step: SearchStep, ids: pa.Table, x: np.ndarray) -> pa.Table:
    """Runs in a worker: the rows of some queries with vectors (q, d)."""
    settings, queries = step.settings, ids[step.source.ids[-1]].combine_chunks()
    opened = opened_in_worker(settings.index, step.output, step.index)
    x, mask = opened.prepared(x), None
    if settings.where is not None:
        mask = _mask(opened, _home(settings, step.output).url, settings.where, step.digest)
    if settings.expand and mask is None:
        x = expanded(opened.index, x, settings.expand, settings.alpha, opened.metric)
    elif settings.expand:
        nearest = opened.search(x, settings.expand, mask)[1]
        x = averaged(x, opened.vectors(nearest), nearest >= 0, settings.alpha, opened.metric)
    want = max(settings.top, settings.rerank_top if step.regions else 0) + settings.leave_out_self
    scores, numbers = opened.search(x, want, mask)
    known = numbers >= 0
    if settings.leave_out_self:
        known &= opened.others(numbers, queries)
    regions = None
    if step.regions is not None:
        assert settings.rerank is not None
        over = opened_in_worker(settings.rerank, step.output, step.regions)
        scores, numbers, regions = best_regions(opened, over, x, numbers, known)
        known = numbers >= 0
    known &= np.cumsum(known, axis=1) <= settings.top
    rank = np.cumsum(known, axis=1)[known].astype(np.int32)
    answers = opened.ids.take(pa.array(numbers[known]))
    columns = {
        "query_id": queries.take(pa.array(np.nonzero(known)[0])),
        "rank": pa.array(rank),
        "score": pa.array(scores[known].astype(np.float32)),
        **{name: answers[name].combine_chunks() for name in answers.column_names},
    }
    if regions is not None:
        columns["region_id"] = pa.array(regions[known], pa.string())
    return pa.table([columns[name] for name in step.schema.names], schema=step.schema)


def best_regions(
    images: OpenIndex, regions: OpenIndex, queries: np.ndarray, numbers: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order each query's images anew.

    Args:
        queries: (q, d) float32, as the indexes compare them. numbers: (q, t) int64 of images; known: (q, t) bool.

    Returns:
        Scores (q, t) float32 by the metric of `regions`, numbers (q, t), -1 behind the last, and the id of each one's
        best region (q, t). Images without regions come last, in the order that they had.
    """
    owners, vectors = _by_image(regions), _vectors(regions)
    names = images.ids["image_id"].to_numpy(zero_copy_only=False)
    region_ids = regions.ids["region_id"].to_numpy(zero_copy_only=False)
    nearer = -1.0 if regions.metric == "l2" else 1.0
    scores = np.full(numbers.shape, -nearer * np.inf, np.float32)
    best = np.full(numbers.shape, "", object)
    for q, row in enumerate(numbers):
        for n in np.flatnonzero(known[q]):
            members = owners.get(names[row[n]])
            if members is None:
                continue
            similarity = _compared(vectors[members], queries[q], regions.metric)
            place = int((nearer * similarity).argmax())
            scores[q, n], best[q, n] = similarity[place], region_ids[members[place]]
    order = np.argsort(np.where(known, -nearer * scores, np.inf), axis=1, kind="stable")
    kept = np.take_along_axis(np.where(known, numbers, -1), order, 1)
    return np.take_along_axis(scores, order, 1), kept, np.take_along_axis(best, order, 1)


def _compared(vectors: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    return np.square(vectors - query).sum(1) if metric == "l2" else vectors @ query


@functools.lru_cache(2)
def _mask(opened: OpenIndex, run: str, where: str, _digest: str) -> np.ndarray:
    """(n,) bool: the rows of an index that a filter keeps, by the tables of its run."""
    return RowColumns(Folder(run), opened.ids).mask(where)


@functools.lru_cache(2)
def _by_image(regions: OpenIndex) -> dict[str, np.ndarray]:
    """Numbers of the regions of each image."""
    regions_of = pl.DataFrame({"image_id": pl.Series(regions.ids["image_id"])}).with_row_index("region")
    by_image = regions_of.partition_by("image_id", as_dict=True)
    return {image: rows["region"].to_numpy() for (image,), rows in by_image.items()}


@functools.lru_cache(2)
def _vectors(regions: OpenIndex) -> np.ndarray:
    """All region vectors (n, d) float32, as the index holds them."""
    return regions.index.reconstruct_n(0, regions.index.ntotal)


def open_step(settings: Search, context: StepContext) -> SearchStep:
    """Open queries and indexes.

    Raises:
        SchemaError: as `open_vectors` and `ready_index`; `rerank` is of no regions; `where` names no such column.
    """
    source = open_vectors(settings.queries, context.output)
    index = ready_index(settings.index, context.output, source)
    regions = ready_index(settings.rerank, context.output, source) if settings.rerank else None
    if regions is not None and ("region_id" not in regions.columns or "image_id" not in index.columns):
        raise SchemaError(f"{settings.name}: rerank: {settings.rerank} is no index over regions, with their `image_id`")
    return SearchStep(settings, context.output, source, index, regions, _filtered_by(settings, context.output, index))


def _home(settings: Search, output: Folder) -> Folder:
    """The run that the index is of."""
    return Folder(split(output.named(settings.index).url)[0])


def _filtered_by(settings: Search, output: Folder, index: tables.Record) -> dict[str, tables.Record]:
    """The tables that `where` reads, by name."""
    if settings.where is None:
        return {}
    home = _home(settings, output)
    try:
        columns = RunColumns(home, [name for name in index.columns if name != "vector_id"])
        read = {columns.all[name].table for name in columns.filter(settings.where).columns}
    except JobError as error:
        raise SchemaError(f"{settings.name}: {error}") from error
    return {name: tables.finished(home.sub(name), name) for name in sorted(read - {""})}


def check_ahead(settings: Search) -> None:
    """Before the first step starts: whether `where` is a filter at all. Raises JobError: it is not."""
    if settings.where is not None:
        parse_where(settings.where, str)
