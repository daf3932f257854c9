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
from clipray.steps.base.shard_writer import map_row_groups, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import FILE, Outcome, VectorStep, open_fit, refuse_other_fit
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup
from clipray.tables.metrics import Metric

MOMENT_ROWS = 131_072  # that a task turns into one state
MEAN = -1  # `component` of the row that holds the mean


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
        return f"{super().description}, in {len(self.source.row_groups)} row groups"

    def make(self, run: RunContext) -> Outcome:
        """Fit unless that is done, project. Raises SchemaError: vectors that are not finite, all equal, or too few."""
        self.begin()
        if self.finished_companion() is None:
            projection = read_projection(self.fitted[0]) if self.fitted else self._fit(run)
            self.write_companion(components_table(projection, self.source.n_features))
        projection = read_projection(self.companion)
        shards = write_rows(self, _projected, (self, projection), run, "projecting")
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
    """Open the input, and the fit of another run. Raises as `open_vectors`; SchemaError: they are of two spaces."""
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


def _projected(shared: tuple[ReduceStep, pca.Projection], ids: pa.Table, x: np.ndarray) -> pa.Table:
    """Runs in a worker: the rows of some vectors (n, d)."""
    step, projection = shared
    normalize = step.settings.normalize
    y = projection.transform(l2_normalize(x) if normalize in ("before", "both") else x)
    y = l2_normalize(y) if normalize in ("after", "both") else y
    _refuse_overflow(step, ids, y)
    vectors = tables.vector_array(y, step.schema.field(step.source.column).type)
    return pa.table([*ids.columns, vectors], schema=step.schema)


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


def components_table(fitted: pca.Projection, n_features: int) -> pa.Table:
    """The mean and the k components as k + 1 rows."""
    schema = tables.arrow_schema("components", {"vector": n_features}, element="float64")
    k = len(fitted.variance)
    none = np.array([np.nan])

    def column(values: np.ndarray) -> pa.Array:
        return pa.array(np.concatenate([none, values]), pa.float64(), from_pandas=True)

    vectors = np.vstack([fitted.mean[None], fitted.components])
    return pa.table(
        [
            pa.array([MEAN, *range(k)], pa.int32()),
            column(fitted.variance),
            column(fitted.explained_variance_ratio),
            column(fitted.scale),
            tables.vector_array(vectors, schema.field("vector").type),
        ],
        schema=schema,
    )


def read_projection(folder: Folder) -> pca.Projection:
    """What `components_table` wrote. Raises SchemaError where it is not there."""
    data = tables.read_shard(folder, FILE)
    order = np.argsort(data["component"].to_numpy())
    vectors = tables.matrix(data["vector"])[order]
    variance, ratio, scale = (data[name].to_numpy()[order][1:] for name in ("variance", "variance_ratio", "scale"))
    return pca.Projection(vectors[0], vectors[1:], variance, ratio, scale)
