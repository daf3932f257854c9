"""Step `search`: queries -> the `neighbours` table, the rows of an index that are nearest to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import expanded
from clipray.errors import SchemaError
from clipray.inputs.index_reader import OpenIndex, opened_once, ready_index
from clipray.inputs.vector_column import IDENTITIES, open_vectors, read_finite
from clipray.job import Search
from clipray.steps.base.shard_writer import make_parts, numbered
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import VectorStep
from clipray.steps.vectors.rerank import best_regions
from clipray.storage.parquet import RowGroup
from clipray.tables.digests import Digest

AT_ONCE = 1_024  # queries


@dataclass(frozen=True)
class SearchStep(VectorStep[Search]):
    """A `Step`; see `VectorStep`: of the queries, each of which gets up to `top` rows. index, regions: records of the indexes."""

    kind: ClassVar[str] = "neighbours"

    index: tables.Record
    regions: tables.Record | None

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        rerank = self.regions.fingerprint if self.regions else None
        return {"queries": self.source.identity, "index": self.index.fingerprint, "rerank": rerank}

    @property
    def made(self) -> dict[str, Any]:
        return {
            "queries": {"name": self.source.name, "digest": self.digest.split("-")[0]},
            "index": {"name": self.settings.index, "files": self.index.provenance["sizes"]},
            "metric": self.index.provenance["metric"],
        }

    @property
    def inputs_digest(self) -> Digest:
        """Of the queries' files and of those that the indexes were made of."""
        digest, indexes = self.source.digest, [r.inputs["digest"] for r in (self.index, self.regions) if r]
        before, content = ("-".join([form, *indexes]) if form else "" for form in (digest.before, digest.content))
        return Digest(before, content)

    @property
    def answers(self) -> list[str]:
        """Identity columns of an answer."""
        found = [name for name in IDENTITIES if name in self.index.columns]
        return [*found, "region_id"] if self.regions and "region_id" not in found else found

    @property
    def schema(self) -> pa.Schema:
        fields = [pa.field(name, pa.string(), nullable=False) for name in self.answers]
        return pa.schema([*tables.arrow_schema("neighbours"), *fields])

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        kind = self.index.figures["type"]
        return [
            f"{self.name}: {self.total} queries from {self.source.name} in {self.settings.index}, {kind} of {self.index.rows}"
        ]

    def make(self, run: RunContext, began: float) -> tables.Record:
        """Search for what is missing, commit. Raises SchemaError: vectors that are not finite."""
        self.begin()
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        shards = make_parts(self, parts, self.stamp, _search_group, run, "searching", row_for_row=False)
        return self.commit(shards, began, row_for_row=False)


def _search_group(item: tuple[SearchStep, list[RowGroup], list[str]]) -> list[tables.Shard]:
    import faiss

    step, group, names = item
    faiss.omp_set_num_threads(1)
    opened = opened_once(
        step.settings.index, step.output.named(step.settings.index).url, step.index.provenance["index_file"]
    )
    rows = []
    for row_group in group:
        ids, x = read_finite(step.source, row_group)
        queries = ids[step.source.ids[-1]].combine_chunks()
        for start in range(0, len(x), AT_ONCE):
            rows.append(_answered(step, opened, queries[start : start + AT_ONCE], x[start : start + AT_ONCE]))
    return [tables.write_shard(step.table, names[0], "neighbours", pa.concat_tables(rows), step.stamp)]


def _answered(step: SearchStep, opened: OpenIndex, queries: pa.Array, x: np.ndarray) -> pa.Table:
    """The rows of some queries (q,) with vectors (q, d)."""
    settings = step.settings
    x = opened.prepared(x)
    if settings.expand:
        x = expanded(opened.index, x, settings.expand, settings.alpha, opened.metric)
    want = max(settings.top, settings.rerank_top if step.regions else 0) + settings.leave_out_self
    scores, numbers = opened.search(x, want)
    names = opened.ids.column(opened.ids.column_names[-1]).to_numpy(zero_copy_only=False)
    known = numbers >= 0
    if settings.leave_out_self:
        known &= names[numbers] != np.array(queries.to_pylist(), object)[:, None]
    regions = None
    if step.regions is not None:
        assert settings.rerank is not None
        over = opened_once(
            settings.rerank, step.output.named(settings.rerank).url, step.regions.provenance["index_file"]
        )
        scores, numbers, regions = best_regions(opened, over, x, numbers, known)
        known = numbers >= 0
    known &= np.cumsum(known, axis=1) <= settings.top
    rank = np.cumsum(known, axis=1)[known].astype(np.int32)
    found = opened.ids.take(pa.array(numbers[known]))
    columns = {
        "query_id": queries.take(pa.array(np.nonzero(known)[0])),
        "rank": pa.array(rank),
        "score": pa.array(scores[known].astype(np.float32)),
        **{name: found[name].combine_chunks() for name in found.column_names},
    }
    if regions is not None:
        columns["region_id"] = pa.array(regions[known], pa.string())
    return pa.table([columns[name] for name in step.schema.names], schema=step.schema)


def prepare(settings: Search, given: StepContext) -> SearchStep:
    """Open queries and indexes.

    Raises:
        JobError, SchemaError, ManifestError: something is not there, or is of another space or width, or has changed.
    """
    source = open_vectors(settings.queries, given.output)
    index = ready_index(settings.index, given.output, source)
    regions = ready_index(settings.rerank, given.output, source) if settings.rerank else None
    if regions is not None and ("region_id" not in regions.columns or "image_id" not in index.columns):
        raise SchemaError(f"{settings.name}: rerank: {settings.rerank} is no index over regions, with their `image_id`")
    return SearchStep(settings, given.output, source, index, regions)
