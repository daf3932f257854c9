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
from clipray.steps.base.shard_writer import count_rows, make_parts, numbered
from clipray.steps.base.step import RunContext, StepContext, Ticker
from clipray.steps.base.table_step import VectorStep, open_fit, refuse_other_fit
from clipray.steps.vectors.components import COMPONENTS, components_schema, components_table, read_projection
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup, chunked
from clipray.tables.metrics import Metric

MOMENT_ROWS = 131_072  # that a task turns into one state


@dataclass(frozen=True)
class ReduceStep(VectorStep[Reduce]):
    """A `Step`; see `VectorStep`. Beside its table lie the components. fitted: those to apply, if they are another run's."""

    kind: ClassVar[str] = "reduced"

    fitted: tuple[Folder, tables.Record] | None

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, **({"fit": self.fitted[1].fingerprint} if self.fitted else {})}

    @property
    def made(self) -> dict[str, Any]:
        """The reduced space is that of the very components, wherever they are applied."""
        own = {"fingerprint": self.fingerprint, "digest": self.digest}
        fit = self.fitted[1].provenance["space"]["reduce"] if self.fitted else own
        return {**super().made, "space": {"reduce": fit, "of": self.source.space}}

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        source = self.source
        return [
            f"{self.name}: {source.n_samples} vectors of {source.n_features} from {source.name}, in {len(source.row_groups)} row groups"
        ]

    def make(self, run: RunContext, began: float) -> tables.Record:
        """Fit unless that is done, project what is missing, commit.

        Raises:
            SchemaError: vectors that cannot be reduced: not finite, all equal, too few.
        """
        self.begin()
        projection = self._projection(run)
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        shards = make_parts(self, parts, self.stamp, _project, run, "projecting", given=(self, projection))
        return self._commit(shards, projection, began)

    def _projection(self, run: RunContext) -> pca.Projection:
        """Have the components in their table, and as it holds them."""
        tables.drop_damaged(self.beside)
        whole, _ = tables.verify_shards(self.beside, tables.shard_names(self.beside))
        if COMPONENTS not in whole or not tables.shard_is(self.beside, COMPONENTS, self.stamp):
            fitted = read_projection(self.fitted[0]) if self.fitted else self._fit(run)
            tables.clear(self.beside, "components")
            data = components_table(fitted, self.source.n_features)
            tables.write_shard(self.beside, COMPONENTS, "components", data, self.stamp)
        return read_projection(self.beside)

    def _fit(self, run: RunContext) -> pca.Projection:
        from clipray.engine.tasks import map_tasks

        settings, source = self.settings, self.source
        work = chunked(source.row_groups, MOMENT_ROWS)
        ticker = Ticker(run, self.name, self.total, "moments")
        done = mm.empty(source.n_features)
        normalize = settings.normalize in ("before", "both")
        items = [(source, group, normalize) for group in work]
        for state in map_tasks(
            _moments_of, items, run.cluster().cpus, lambda n: ticker.at(sum(map(count_rows, work[:n])), 0)
        ):
            done = mm.combine(done, state)
        try:
            return pca.fit(
                done,
                n_components=settings.components,
                explained_variance=settings.explained_variance,
                whiten=settings.whiten,
                epsilon=settings.epsilon,
                shrinkage=settings.shrinkage,
            )
        except ValueError as error:
            raise SchemaError(f"{self.name}: {source.name}: {error}") from error

    def _commit(self, shards: list[tables.Shard], projection: pca.Projection, began: float) -> tables.Record:
        found = projection.variance_ratio
        share = round(float(found.sum()), 6)
        figures = {
            "components": len(found),
            "explained_variance_ratio": share,
            "first_variance_ratios": [round(float(ratio), 6) for ratio in found[:10]],
        }
        file = tables.verified(self.beside, COMPONENTS)
        self.finish(self.beside, "components", components_schema(self.source.n_features), [file])
        metrics = [Metric("explained_variance_ratio", share, n=self.total)]
        return self.commit(shards, began, figures=figures, metrics=metrics)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of the reduced table: identities, and the column of the input under its own name."""
        width = len(read_projection(self.beside).variance)  # known once the components are there
        kind = tables.vector_type(width, self.settings.vector_type)
        return pa.schema([*self.source.id_fields, pa.field(self.source.column, kind, nullable=False)])


def prepare(settings: Reduce, given: StepContext) -> ReduceStep:
    """Open the input, and the fit where it is another run's.

    Raises:
        JobError, SchemaError, ManifestError: the input or the fit is not there, or they are of two spaces.
    """
    source = open_vectors(settings.input, given.output)
    if settings.fit is not None:
        fitted, record = open_fit(settings.fit, "components", given.output)
        width, space = len(read_projection(fitted).mean), record.provenance["space"]["of"]
        refuse_other_fit(settings.name, settings.fit, width, space, source)
        return ReduceStep(settings, given.output, source, (fitted, record))
    if settings.components is not None and settings.components > source.n_features:
        raise SchemaError(
            f"{settings.name}: components={settings.components} should be <= n_features={source.n_features} of {source.name}"
        )
    return ReduceStep(settings, given.output, source, None)


def _read(source: VectorColumn, row_group: RowGroup, normalize: bool) -> tuple[pa.Table, np.ndarray]:
    """Identities and vectors of a row group, L2-normalised where `normalize`; a vector that is not finite is an error."""
    ids, x = read_finite(source, row_group)
    return ids, l2_normalize(x) if normalize else x


def _moments_of(item: tuple[VectorColumn, list[RowGroup], bool]) -> mm.Moments:
    source, group, normalize = item
    state = mm.empty(source.n_features)
    for row_group in group:
        state = mm.combine(state, mm.moments(_read(source, row_group, normalize)[1]))
    return state


def _project(item: tuple[tuple[ReduceStep, pca.Projection], list[RowGroup], list[str]]) -> list[tables.Shard]:
    (step, projection), group, (name,) = item
    normalize, parts = step.settings.normalize, []
    for row_group in group:
        ids, x = _read(step.source, row_group, normalize in ("before", "both"))
        y = projection.transform(x)
        y = l2_normalize(y) if normalize in ("after", "both") else y
        _refuse_overflow(step, ids, y)
        vectors = tables.vector_array(y, step.schema.field(step.source.column).type)
        parts.append(pa.table([*ids.columns, vectors], schema=step.schema))
    return [tables.write_shard(step.table, name, "reduced", pa.concat_tables(parts), step.stamp)]


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
