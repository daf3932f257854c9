"""Step `augment`: a vector column and an index of it -> the table `augmented`, each vector averaged with its nearest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.vector_index import averaged
from clipray.inputs.index_reader import opened_in_worker, ready_index
from clipray.inputs.vector_column import open_vectors
from clipray.job import Augment
from clipray.steps.base.shard_writer import write_rows
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
        model, metric = self.source.provenance.get("model"), self.index.provenance["metric"]
        index = {"name": self.settings.index, "metric": metric}
        normalize = "l2" if metric == "cosine" else "none"
        return {**super().row_provenance, "model": model, "index": index, "normalize": normalize}

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
        return Outcome(write_rows(self, _augmented, self, run, "averaging", at_once=AT_ONCE))


def _augmented(step: AugmentStep, ids: pa.Table, x: np.ndarray) -> pa.Table:
    """Runs in a worker: the rows of some vectors (q, d), averaged with the nearest other rows."""
    opened, count = opened_in_worker(step.settings.index, step.output, step.index), step.settings.neighbours
    x = opened.prepared(x)
    _, numbers, vectors = opened.index.search_and_reconstruct(x, min(count + 1, len(opened.ids)))
    known = (numbers >= 0) & opened.others(numbers, ids[step.source.ids[-1]])
    known &= np.cumsum(known, axis=1) <= count
    y = averaged(x, vectors, known, step.settings.alpha, opened.metric)
    column_type = step.schema.field(step.source.column).type
    return pa.table([*ids.columns, tables.vector_array(y, column_type)], schema=step.schema)


def open_step(settings: Augment, context: StepContext) -> AugmentStep:
    """Open the input and the index. Raises as `open_vectors` and `ready_index`."""
    source = open_vectors(settings.input, context.output)
    return AugmentStep(settings, context.output, source, ready_index(settings.index, context.output, source))
