"""Step `augment`: a vector column and an index of it -> the table `augmented`, each vector averaged with its nearest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import averaged
from clipray.inputs.index_reader import OpenIndex, opened_in_worker, ready_index
from clipray.inputs.vector_column import open_vectors
from clipray.job import Augment
from clipray.steps.base.shard_writer import Part, numbered, write_parts, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.tables.digests import Digest, combined

AT_ONCE = 1_024  # rows, each with the vectors of its neighbours


@dataclass(frozen=True)
class AugmentStep(VectorStep[Augment]):
    """A `Step`; see `VectorStep`. index: the record of the index."""

    table_type: ClassVar[str] = "augmented"

    index: tables.Record

    @property
    def inputs_digest(self) -> Digest:
        return combined([self.source.digest, self.index.inputs["digest"]])

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "index": self.index.fingerprint}

    @property
    def row_provenance(self) -> dict[str, Any]:
        index = {"name": self.settings.index, "metric": self.index.provenance["metric"]}
        normalize = "l2" if index["metric"] == "cosine" else "none"
        return {
            **super().row_provenance,
            "model": self.source.provenance.get("model"),
            "index": index,
            "normalize": normalize,
        }

    @property
    def schema(self) -> pa.Schema:
        return self.of_vectors(self.source.n_features, self.settings.vector_type)

    @property
    def description(self) -> str:
        nearest = f"{self.settings.neighbours} nearest in {self.settings.index}"
        return f"{self.total} vectors of {self.source.name}, each with its {nearest}"

    def make(self, run: RunContext) -> Outcome:
        """Average what is missing. Raises SchemaError: vectors that are not finite."""
        self.begin()
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        return Outcome(write_parts(self, parts, _augment, self, run, "averaging"))


def _augment(part: Part, step: AugmentStep) -> list[tables.Shard]:
    """Runs in a worker: averages the part's vectors and writes their rows."""
    opened = opened_in_worker(step.settings.index, step.output, step.index)

    def averaged_rows(ids: pa.Table, x: np.ndarray) -> pa.Table:
        names = np.array(ids[step.source.ids[-1]].to_pylist(), object)
        y = [_averaged(step, opened, names[n : n + AT_ONCE], x[n : n + AT_ONCE]) for n in range(0, len(x), AT_ONCE)]
        vectors = tables.vector_array(np.concatenate(y), step.schema.field(step.source.column).type)
        return pa.table([*ids.columns, vectors], schema=step.schema)

    return write_rows(step, part, averaged_rows)


def _averaged(step: AugmentStep, opened: OpenIndex, ids: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows `ids` (q,), strings, with vectors (q, d), averaged with the nearest other rows."""
    count, x = step.settings.neighbours, opened.prepared(x)
    _, numbers, vectors = opened.index.search_and_reconstruct(x, min(count + 1, len(opened.ids)))
    names = opened.ids.column(opened.ids.column_names[-1]).to_numpy(zero_copy_only=False)
    known = (numbers >= 0) & (names[numbers] != ids[:, None])
    known &= np.cumsum(known, axis=1) <= count
    return averaged(x, vectors, known, step.settings.alpha, opened.metric)


def open_step(settings: Augment, context: StepContext) -> AugmentStep:
    """Open the input and the index.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, has changed, or they are of two spaces or widths.
    """
    source = open_vectors(settings.input, context.output)
    return AugmentStep(settings, context.output, source, ready_index(settings.index, context.output, source))
