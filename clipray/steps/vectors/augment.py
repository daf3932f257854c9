"""Step `augment`: a vector column and an index of it -> the table `augmented`, each vector averaged with its nearest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import averaged
from clipray.inputs.index_reader import OpenIndex, opened_once, ready_index
from clipray.inputs.vector_column import open_vectors, read_finite
from clipray.job import Augment
from clipray.steps.base.shard_writer import make_parts, numbered
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import VectorStep
from clipray.storage.parquet import RowGroup
from clipray.tables.digests import Digest, combined

AT_ONCE = 1_024  # rows, each with the vectors of its neighbours


@dataclass(frozen=True)
class AugmentStep(VectorStep[Augment]):
    """A `Step`; see `VectorStep`. index: the record of the index."""

    kind: ClassVar[str] = "augmented"

    index: tables.Record

    @property
    def inputs_digest(self) -> Digest:
        return combined([self.source.digest, self.index.inputs["digest"]])

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "index": self.index.fingerprint}

    @property
    def made(self) -> dict[str, Any]:
        index = {"name": self.settings.index, "metric": self.index.provenance["metric"]}
        normalize = "l2" if index["metric"] == "cosine" else "none"
        return {**super().made, "model": self.source.provenance.get("model"), "index": index, "normalize": normalize}

    @property
    def schema(self) -> pa.Schema:
        kind = tables.vector_type(self.source.n_features, self.settings.vector_type)
        return pa.schema([*self.source.id_fields, pa.field(self.source.column, kind, nullable=False)])

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        nearest = f"{self.settings.neighbours} nearest in {self.settings.index}"
        return [f"{self.name}: {self.total} vectors of {self.source.name}, each with its {nearest}"]

    def make(self, run: RunContext, began: float) -> tables.Record:
        """Average what is missing, commit. Raises SchemaError: vectors that are not finite."""
        self.begin()
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        return self.commit(make_parts(self, parts, self.stamp, _augment, run, "averaging"), began)


def _augment(item: tuple[AugmentStep, list[RowGroup], list[str]]) -> list[tables.Shard]:
    """Runs in a worker: averages row groups and writes their rows."""
    import faiss

    step, group, (name,) = item
    faiss.omp_set_num_threads(1)
    wanted, parts = step.settings.index, []
    opened = opened_once(wanted, step.output.named(wanted).url, step.index.provenance["index_file"])
    for row_group in group:
        ids, x = read_finite(step.source, row_group)
        own = np.array(ids[step.source.ids[-1]].to_pylist(), object)
        y = [_averaged(step, opened, own[n : n + AT_ONCE], x[n : n + AT_ONCE]) for n in range(0, len(x), AT_ONCE)]
        vectors = tables.vector_array(np.concatenate(y), step.schema.field(step.source.column).type)
        parts.append(pa.table([*ids.columns, vectors], schema=step.schema))
    return [tables.write_shard(step.table, name, step.kind, pa.concat_tables(parts), step.stamp)]


def _averaged(step: AugmentStep, opened: OpenIndex, own: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows `own` (q,), names, with vectors (q, d), averaged with the nearest other rows."""
    count, x = step.settings.neighbours, opened.prepared(x)
    _, numbers, vectors = opened.index.search_and_reconstruct(x, min(count + 1, len(opened.ids)))
    names = opened.ids.column(opened.ids.column_names[-1]).to_numpy(zero_copy_only=False)
    known = (numbers >= 0) & (names[numbers] != own[:, None])
    known &= np.cumsum(known, axis=1) <= count
    return averaged(x, vectors, known, step.settings.alpha, opened.metric)


def prepare(settings: Augment, given: StepContext) -> AugmentStep:
    """Open the input and the index.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, has changed, or they are of two spaces or widths.
    """
    source = open_vectors(settings.input, given.output)
    return AugmentStep(settings, given.output, source, ready_index(settings.index, given.output, source))
