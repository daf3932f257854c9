"""Step `search`: queries -> the `neighbours` table, the rows of an index that are nearest to each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import expanded
from clipray.errors import SchemaError
from clipray.inputs.index_reader import OpenIndex, opened_in_worker, ready_index
from clipray.inputs.vector_column import IDENTITIES, open_vectors
from clipray.job import Search
from clipray.steps.base.shard_writer import Part, numbered, write_parts, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.steps.vectors.rerank import best_regions
from clipray.tables.digests import Digest

AT_ONCE = 1_024  # queries


@dataclass(frozen=True)
class SearchStep(VectorStep[Search]):
    """A `Step`; see `VectorStep`: of the queries, each of which gets up to `top` rows. index, regions: records of the indexes."""

    table_type: ClassVar[str] = "neighbours"

    index: tables.Record
    regions: tables.Record | None

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        rerank = self.regions.fingerprint if self.regions else None
        return {"queries": self.source.identity, "index": self.index.fingerprint, "rerank": rerank}

    @property
    def row_provenance(self) -> dict[str, Any]:
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
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        shards = write_parts(self, parts, _search, self, run, "searching", row_for_row=False)
        return Outcome(shards, row_for_row=False)


def _search(part: Part, step: SearchStep) -> list[tables.Shard]:
    """Runs in a worker: searches for the part's queries and writes their answers."""
    opened = opened_in_worker(step.settings.index, step.output, step.index)

    def answers(ids: pa.Table, x: np.ndarray) -> pa.Table:
        queries = ids[step.source.ids[-1]].combine_chunks()
        starts = range(0, len(x), AT_ONCE)
        return pa.concat_tables(_answered(step, opened, queries[n : n + AT_ONCE], x[n : n + AT_ONCE]) for n in starts)

    return write_rows(step, part, answers)


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


def open_step(settings: Search, context: StepContext) -> SearchStep:
    """Open queries and indexes.

    Raises:
        JobError, SchemaError, ManifestError: something is not there, or is of another space or width, or has changed.
    """
    source = open_vectors(settings.queries, context.output)
    index = ready_index(settings.index, context.output, source)
    regions = ready_index(settings.rerank, context.output, source) if settings.rerank else None
    if regions is not None and ("region_id" not in regions.columns or "image_id" not in index.columns):
        raise SchemaError(f"{settings.name}: rerank: {settings.rerank} is no index over regions, with their `image_id`")
    return SearchStep(settings, context.output, source, index, regions)
