"""Step `reduce`: a vector column -> the `reduced` table, its principal components.

Two passes over the input: moments of its row groups, combined in their order, from which the driver takes the components;
then every row group is projected and written. A kill costs what was not written: the fitted components and each shard are
kept, and belong to the run only when settings and input are still the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis import moments as mm
from clipray.analysis import pca
from clipray.analysis.normalize import l2_normalize
from clipray.errors import SchemaError
from clipray.inputs.vector_column import VectorColumn, open_vectors, read_finite
from clipray.job import Reduce
from clipray.steps.base.shard_writer import Part, map_row_groups, numbered, write_parts, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep, open_fit, refuse_other_fit
from clipray.steps.vectors.components import components_table, read_projection
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup
from clipray.tables.metrics import Metric

MOMENT_ROWS = 131_072  # that a task turns into one state


@dataclass(frozen=True)
class ReduceStep(VectorStep[Reduce]):
    """A `Step`; see `VectorStep`. Beside its table lie the components. fitted: those to apply, if they are another run's."""

    table_type: ClassVar[str] = "reduced"
    companion_type: ClassVar[str] = "components"

    fitted: tuple[Folder, tables.Record] | None

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, **({"fit": self.fitted[1].fingerprint} if self.fitted else {})}

    @property
    def row_provenance(self) -> dict[str, Any]:
        """The reduced space is that of the very components, wherever they are applied."""
        this_fit = {"fingerprint": self.fingerprint, "digest": self.digest}
        fit = self.fitted[1].provenance["space"]["reduce"] if self.fitted else this_fit
        return {**super().row_provenance, "space": {"reduce": fit, "of": self.source.space}}

    @property
    def description(self) -> str:
        source = self.source
        return f"{source.n_samples} vectors of {source.n_features} from {source.name}, in {len(source.row_groups)} row groups"

    def make(self, run: RunContext) -> Outcome:
        """Fit unless that is done, project what is missing.

        Raises:
            SchemaError: vectors that cannot be reduced: not finite, all equal, too few.
        """
        self.begin()
        if self.finished_companion() is None:
            projection = read_projection(self.fitted[0]) if self.fitted else self._fit(run)
            self.write_companion(components_table(projection, self.source.n_features))
        projection = read_projection(self.companion)
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        shards = write_parts(self, parts, _project, (self, projection), run, "projecting")
        ratios = projection.explained_variance_ratio
        share = round(float(ratios.sum()), 6)
        summary = {
            "components": len(ratios),
            "explained_variance_ratio": share,
            "first_variance_ratios": [round(float(ratio), 6) for ratio in ratios[:10]],
        }
        return Outcome(shards, summary, [Metric("explained_variance_ratio", share, n=self.total)])

    def _fit(self, run: RunContext) -> pca.Projection:
        settings, source = self.settings, self.source
        moments = mm.empty(source.n_features)
        normalize = settings.normalize in ("before", "both")
        for state in map_row_groups(_moments_of, source, MOMENT_ROWS, run, self.name, "moments", normalize):
            moments = mm.combine(moments, state)
        try:
            return pca.fit(
                moments,
                n_components=settings.components,
                explained_variance=settings.explained_variance,
                whiten=settings.whiten,
                epsilon=settings.epsilon,
                shrinkage=settings.shrinkage,
            )
        except ValueError as error:
            raise SchemaError(f"{self.name}: {source.name}: {error}") from error

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of the reduced table: identities, and the column of the input under its own name."""
        width = len(read_projection(self.companion).variance)  # known once the components are there
        return self.of_vectors(width, self.settings.vector_type)


def open_step(settings: Reduce, context: StepContext) -> ReduceStep:
    """Open the input, and the fit where it is another run's.

    Raises:
        JobError, SchemaError, ManifestError: the input or the fit is not there, or they are of two spaces.
    """
    source = open_vectors(settings.input, context.output)
    if settings.fit is not None:
        fitted, record = open_fit(settings.fit, "components", context.output)
        width, space = len(read_projection(fitted).mean), record.provenance["space"]["of"]
        refuse_other_fit(settings.name, settings.fit, width, space, source)
        return ReduceStep(settings, context.output, source, (fitted, record))
    if settings.components is not None and settings.components > source.n_features:
        raise SchemaError(
            f"{settings.name}: components={settings.components} should be <= n_features={source.n_features} of {source.name}"
        )
    return ReduceStep(settings, context.output, source, None)


def _moments_of(item: tuple[VectorColumn, list[RowGroup]], normalize: bool) -> mm.Moments:
    source, group = item
    state = mm.empty(source.n_features)
    for row_group in group:
        _, x = read_finite(source, row_group)
        state = mm.combine(state, mm.moments(l2_normalize(x) if normalize else x))
    return state


def _project(part: Part, shared: tuple[ReduceStep, pca.Projection]) -> list[tables.Shard]:
    """Runs in a worker: projects the part's vectors and writes their rows."""
    step, projection = shared
    normalize = step.settings.normalize

    def projected(ids: pa.Table, x: np.ndarray) -> pa.Table:
        y = projection.transform(l2_normalize(x) if normalize in ("before", "both") else x)
        y = l2_normalize(y) if normalize in ("after", "both") else y
        _refuse_overflow(step, ids, y)
        vectors = tables.vector_array(y, step.schema.field(step.source.column).type)
        return pa.table([*ids.columns, vectors], schema=step.schema)

    return write_rows(step, part, projected)


def _refuse_overflow(step: ReduceStep, ids: pa.Table, y: np.ndarray) -> None:
    """Raises SchemaError where a component is larger than the table's type holds."""
    largest = float(np.finfo(step.settings.vector_type).max)
    bad = np.flatnonzero(~(np.abs(y) <= largest).all(axis=1))[:5]
    if len(bad):
        key = step.source.ids[-1]
        named = ", ".join(map(repr, ids[key].take(pa.array(bad)).to_pylist()))
        raise SchemaError(
            f"{step.name}: components beyond {largest:g}, the largest {step.settings.vector_type}, {key}: {named}; "
            "set `vector_type: float32` or `normalize`, or scale the input"
        )
