"""Step `reduce`: a vector column -> the `reduced` table, its principal components.

Two passes over the input: moments of its pieces, combined in their order, from which the driver takes the components;
then every piece is projected and written. A kill costs what was not written: the fitted components and each shard are
kept, and belong to the run only when settings and input are still the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.analysis import moments as mm
from clipray.analysis import pca
from clipray.errors import SchemaError
from clipray.job import changes, fingerprint
from clipray.settings import Reduce
from clipray.steps.components import COMPONENTS, components_schema, components_table, read_projection
from clipray.steps.metrics import Metric, write_metrics
from clipray.steps.step import STARTED, Given, Run, State, Ticker, refuse_stale, standing
from clipray.storage import Folder, absolute
from clipray.vectors import Piece, Vectors, groups, open_vectors, read_piece, unit

MOMENT_ROWS = 131_072  # that a task turns into one state


@dataclass(frozen=True)
class ReduceStep:
    """A `Step`; see `Step`."""

    settings: Reduce
    output: Folder
    source: Vectors
    fitted: Folder | None  # the components to apply, where they are another run's

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def total(self) -> int:
        return self.source.n_samples

    @property
    def table(self) -> Folder:
        return self.output.sub(self.name)

    @property
    def components(self) -> Folder:
        return self.output.sub(f"{self.name}_components")

    @property
    def identity(self) -> dict[str, Any]:
        version = tables.table_schema("reduced")["version"]
        own = {key: value for key, value in self.settings.identity().items() if key not in ("name", "input", "fit")}
        fit = {} if self.fitted is None else {"fit": finished_record(self.fitted, "fit").fingerprint}
        return {"step": "reduce", "schema_version": version, "input": self.source.identity, **own, **fit}

    def inspect(self, *, count: bool = True) -> State:  # noqa: ARG002 - whole files are made, none is counted
        state = standing(self.table, self.identity, self.source.digest)
        record = tables.read_record(self.components)
        if state.kind == "finished" and (record is None or not tables.intact(self.components, record)):
            return State("partial")
        return state

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        source = self.source
        return [
            f"{self.name}: {source.n_samples} vectors of {source.n_features} from {source.name}, in {len(source.pieces)} row groups"
        ]

    def run(self, run: Run) -> tables.Record:
        """Fit unless that is done, project what is missing, commit.

        Raises:
            StaleTableError: the table was made with other settings.
            SchemaError: vectors that cannot be reduced: not finite, all equal, too few.
        """
        refuse_stale(self.table, self.inspect())
        began = time.monotonic()
        run.events.write("step_started", step=self.name, rows=self.total, fingerprint=fingerprint(self.identity))
        cpus = run.cluster().cpus
        self._begin()
        projection = self._projection(run, cpus)
        shards = self._project(run, cpus, projection)
        seconds = time.monotonic() - began
        return self._commit(shards, projection, seconds)

    @property
    def _stamp(self) -> dict[str, Any]:
        source = self.source
        return {
            "fingerprint": fingerprint(self.identity),
            "input": {"name": source.name, "digest": source.digest, **source.identity},
            "space": {"reduce": self._fit_identity(), "of": source.space},
            "versions": {"clipray": __version__, "numpy": np.__version__},
        }

    def _fit_identity(self) -> dict[str, Any]:
        """What the reduced space is: the very components, wherever they are applied."""
        if self.fitted is not None:
            return dict(finished_record(self.fitted, "fit").provenance["space"]["reduce"])
        return {"fingerprint": fingerprint(self.identity), "digest": self.source.digest}

    def _begin(self) -> None:
        """Open the tables for writing; what was made of another input goes."""
        before = self.table.read_json(STARTED) or {}
        mine = {"settings": self.identity, "fingerprint": fingerprint(self.identity), "digest": self.source.digest}
        for folder in (self.table, self.components):
            folder.remove(tables.RECORD)
            if before.get("digest") != self.source.digest:
                for name in tables.shard_names(folder):
                    folder.remove(name)
            for name in list(folder.leftovers()):
                folder.remove(name)
        self.table.write_json(STARTED, {**mine, "started_at": before.get("started_at", tables.now())})

    def _projection(self, run: Run, cpus: float) -> pca.Projection:
        if not tables.shard_names(self.components) or not tables.shard_is(self.components, COMPONENTS, self._stamp):
            fitted = read_projection(self.fitted) if self.fitted is not None else self._fit(run, cpus)
            data = components_table(fitted, self.source.n_features)
            tables.write_shard(self.components, COMPONENTS, "components", data, self._stamp)
        return read_projection(self.components)

    def _fit(self, run: Run, cpus: float) -> pca.Projection:
        from clipray.engine.tasks import map_tasks

        settings, source = self.settings, self.source
        work = groups(source.pieces, MOMENT_ROWS)
        ticker = Ticker(run, self.name, self.total, "moments")
        done = mm.empty(source.n_features)
        normalize = settings.normalize in ("before", "both")
        items = [(source, group, normalize) for group in work]
        for state in map_tasks(_moments_of, items, cpus, lambda n: ticker.at(sum(_rows(g) for g in work[:n]), 0)):
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

    def _project(self, run: Run, cpus: float, projection: pca.Projection) -> list[tables.Shard]:
        from clipray.engine.tasks import map_tasks

        settings = self.settings
        work = groups(self.source.pieces, settings.rows_per_file)
        names = [f"part-{n:06d}.parquet" for n in range(len(work))]
        for name in set(tables.shard_names(self.table)) - set(names):
            self.table.remove(name)
        sizes = self.table.sizes()
        shards = {
            name: tables.Shard(name, _rows(group), sizes[name])
            for name, group in zip(names, work, strict=True)
            if name in sizes and tables.shard_is(self.table, name, self._stamp, _rows(group))
        }
        before = sum(shard.rows for shard in shards.values())
        todo = [(n, g) for n, g in zip(names, work, strict=True) if n not in shards]
        ticker = Ticker(run, self.name, self.total, "projecting")
        items = [(self, projection, name, group) for name, group in todo]
        for shard in map_tasks(
            _project_group, items, cpus, lambda n: ticker.at(done := sum(_rows(g) for _, g in todo[:n]), before + done)
        ):
            shards[shard.name] = shard
        return [shards[name] for name in names]

    def _commit(self, shards: list[tables.Shard], projection: pca.Projection, seconds: float) -> tables.Record:
        rows = sum(shard.rows for shard in shards)
        if rows != self.total:
            raise AssertionError(f"rows in = {self.total}, but {rows} written: this is a defect in clipray")
        common: dict[str, Any] = {
            "fingerprint": fingerprint(self.identity),
            "inputs": {"rows": rows, "digest": self.source.digest, "input": self.source.name},
            "settings": self.identity,
            "provenance": self._stamp,
            "finished_at": tables.now(),
        }
        found = projection.variance_ratio
        figures: dict[str, Any] = {
            "components": len(found),
            "explained_variance_ratio": round(float(found.sum()), 6),
            "first_variance_ratios": [round(float(ratio), 6) for ratio in found[:10]],
        }
        share = figures["explained_variance_ratio"]
        write_metrics(self.output, self.name, [Metric("explained_variance_ratio", share, n=rows)], self._stamp)
        file = tables.Shard(COMPONENTS, len(found) + 1, self.components.sizes()[COMPONENTS])
        tables.finish(self.components, "components", components_schema(self.source.n_features), [file], **common)
        return tables.finish(
            self.table,
            "reduced",
            self.schema(len(found)),
            shards,
            figures=figures,
            seconds=round(seconds, 2),
            rows_per_s=round(rows / max(seconds, 1e-9), 2),
            **common,
        )

    def schema(self, n_components: int) -> pa.Schema:
        """Of the reduced table: identities, and the column of the input under its own name."""
        vector = pa.field(
            self.source.column, tables.vector_type(n_components, self.settings.vector_type), nullable=False
        )
        return pa.schema([*self.source.id_fields, vector])


def prepare(settings: Reduce, given: Given) -> ReduceStep:
    """Open the input, and the fit where it is another run's.

    Raises:
        JobError, SchemaError, ManifestError: the input or the fit is not there, or they are of two spaces.
    """
    source = open_vectors(settings.input, given.output)
    if settings.fit is None:
        if settings.components is not None and settings.components > source.n_features:
            raise SchemaError(
                f"{settings.name}: components={settings.components} should be <= n_features={source.n_features} of {source.name}"
            )
        return ReduceStep(settings, given.output, source, None)
    url = absolute(settings.fit) if "/" in settings.fit else given.output.sub(settings.fit).url
    fitted = Folder(f"{url}_components")
    provenance = finished_record(fitted, f"fit {settings.fit}").provenance
    before = provenance["space"]["of"]
    width = read_projection(fitted).mean.shape[0]
    if width != source.n_features:
        raise SchemaError(
            f"{settings.name}: {settings.fit} was fitted on vectors of {width}, {source.name} has {source.n_features}"
        )
    if before and source.space and before != source.space:
        raise SchemaError(
            f"{settings.name}: {settings.fit} was fitted in another space than {source.name}: {'; '.join(changes(before, source.space))}"
        )
    return ReduceStep(settings, given.output, source, fitted)


def finished_record(folder: Folder, what: str) -> tables.Record:
    """Raises SchemaError where the table is not finished."""
    record = tables.read_record(folder)
    if record is None:
        raise SchemaError(f"{what}: {folder.url} is no finished table; finish it with `clipray run`")
    return record


def _rows(group: list[Piece]) -> int:
    return sum(piece.rows for piece in group)


def _read(source: Vectors, piece: Piece, normalize: bool) -> tuple[pa.Table, np.ndarray]:
    """Identities and vectors of a piece, L2-normalised where `normalize`; a vector that is not finite is an error."""
    ids, x = read_piece(source, piece)
    bad = mm.first_bad_rows(x)
    if len(bad):
        named = ", ".join(repr(value) for value in ids[source.ids[-1]].take(pa.array(bad)).to_pylist())
        raise SchemaError(
            f"{source.name}: vectors that are not finite, {source.ids[-1]}: {named}; mend or drop these rows"
        )
    return ids, unit(x) if normalize else x


def _moments_of(item: tuple[Vectors, list[Piece], bool]) -> mm.Moments:
    source, group, normalize = item
    state = mm.empty(source.n_features)
    for piece in group:
        state = mm.combine(state, mm.moments(_read(source, piece, normalize)[1]))
    return state


def _project_group(item: tuple[ReduceStep, pca.Projection, str, list[Piece]]) -> tables.Shard:
    step, projection, name, group = item
    normalize, schema = step.settings.normalize, step.schema(len(projection.variance))
    parts = []
    for piece in group:
        ids, x = _read(step.source, piece, normalize in ("before", "both"))
        y = projection.transform(x)
        y = unit(y) if normalize in ("after", "both") else y
        parts.append(
            pa.table([*ids.columns, tables.vector_array(y, schema.field(step.source.column).type)], schema=schema)
        )
    return tables.write_shard(step.table, name, "reduced", pa.concat_tables(parts), step._stamp)
