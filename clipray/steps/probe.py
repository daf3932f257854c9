"""Step `probe`: a vector column and known labels -> a table of labels, by a linear probe.

Each strength of the penalty is tried in a task of its own; the best is trained once more, with the validation rows. The
coefficients are a table, from which every worker labels its part. A kill costs what was not written.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.analysis import probe as pb
from clipray.errors import SchemaError
from clipray.job import changes, fingerprint
from clipray.labelled import digest_of, finished, mark_of
from clipray.settings import Probe
from clipray.steps.label import labels_table
from clipray.steps.metrics import Metric, write_metrics
from clipray.steps.parts import begin, make_parts
from clipray.steps.probe_rows import labelled_rows
from clipray.steps.step import Given, Run, State, Ticker, refuse_stale, standing
from clipray.storage import Folder, absolute
from clipray.vectors import Piece, Vectors, groups, open_vectors, read_finite

CLASSES = "part-000000.parquet"
STYLE = "probe"


@dataclass(frozen=True)
class ProbeStep:
    """A `Step`; see `Step`.

    Attributes:
        truth: what decides the known labels. digest: of the vectors' files and of theirs.
        fitted: the coefficients to apply, where they are another run's.
    """

    settings: Probe
    output: Folder
    source: Vectors
    truth: dict[str, Any] | None
    digest: str
    fitted: Folder | None

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
    def classes(self) -> Folder:
        return self.output.sub(f"{self.name}_classes")

    @property
    def identity(self) -> dict[str, Any]:
        version = tables.table_schema("labels")["version"]
        skip = {"name", "input", "truth", "fit"}
        own = {key: value for key, value in self.settings.identity().items() if key not in skip}
        what = {"truth": self.truth} if self.fitted is None else {"fit": finished(self.fitted, "fit").fingerprint}
        return {"step": "probe", "schema_version": version, "input": self.source.identity, **own, **what}

    def inspect(self, *, count: bool = True) -> State:  # noqa: ARG002 - whole files are made, none is counted
        state = standing(self.table, self.identity, self.digest)
        record = tables.read_record(self.classes)
        if state.kind == "finished" and (record is None or not tables.intact(self.classes, record)):
            return State("partial")
        return state

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        source, how = self.source, f"C of {self.settings.c}" if self.fitted is None else f"fit {self.settings.fit}"
        return [f"{self.name}: {source.n_samples} vectors of {source.n_features} from {source.name}, {how}"]

    def run(self, run: Run) -> tables.Record:
        """Train unless that is done, label what is missing, commit.

        Raises:
            StaleTableError: the table was made with other settings.
            SchemaError: too few rows or classes to train on, or vectors that are not finite.
        """
        refuse_stale(self.table, self.inspect())
        began = time.monotonic()
        run.events.write("step_started", step=self.name, rows=self.total, fingerprint=fingerprint(self.identity))
        figures = self._trained(run)
        begin(self, self.digest)
        work = groups(self.source.pieces, self.settings.rows_per_file)
        parts = [(group, [f"part-{n:06d}.parquet"]) for n, group in enumerate(work)]
        shards = make_parts(self, parts, self.stamp, _label_group, run, "labelling")
        return self._commit(shards, figures, time.monotonic() - began)

    @functools.cached_property
    def stamp(self) -> dict[str, Any]:
        """Provenance of both tables."""
        source = self.source
        return {
            "fingerprint": fingerprint(self.identity),
            "input": {"name": source.name, "digest": self.digest, **source.identity},
            "space": source.space,
            "versions": {"clipray": __version__, "numpy": np.__version__},
        }

    def _trained(self, run: Run) -> dict[str, Any]:
        """Have the coefficients in their table; the figures of training."""
        record = tables.read_record(self.classes)
        if (
            record is not None
            and tables.intact(self.classes, record)
            and tables.shard_is(self.classes, CLASSES, self.stamp)
        ):
            return record.figures
        if self.fitted is not None:
            labels, found, figures = *read_probe(self.fitted), {"fit": self.settings.fit}
        else:
            labels, found, figures = self._fit(run)
        for name in [tables.RECORD, *tables.shard_names(self.classes), *self.classes.leftovers()]:
            self.classes.remove(name)
        schema = tables.arrow_schema("probe_classes", {"vector": self.source.n_features}, element="float64")
        vectors = tables.vector_array(found.vectors, schema.field("vector").type)
        data = pa.table([pa.array(labels), pa.array(found.intercepts), vectors], schema=schema)
        shard = tables.write_shard(self.classes, CLASSES, "probe_classes", data, self.stamp)
        tables.finish(
            self.classes, "probe_classes", schema, [shard], fingerprint=self.stamp["fingerprint"], figures=figures,
            inputs={"digest": self.digest}, settings=self.identity, provenance=self.stamp, finished_at=tables.now(),
        )  # fmt: skip
        return figures

    def _fit(self, run: Run) -> tuple[list[str], pb.Probe, dict[str, Any]]:
        from clipray.engine.tasks import map_tasks

        settings, cpus = self.settings, run.cluster().cpus
        ticker = Ticker(run, self.name, self.total, "training")
        tries = sorted(set(settings.c))
        tried = list(
            map_tasks(
                _try, [(self, c) for c in tries], cpus, lambda n: ticker.at(0, 0, f"training, {n} of {len(tries)}")
            )
        )
        best = max(range(len(tries)), key=lambda n: (tried[n]["validation_accuracy"], -n))
        (labels, found, figures) = next(map_tasks(_finish, [(self, tries[best])], cpus, lambda _: ticker.at(0, 0)))
        if not found.converged:
            run.say(f"{self.name}: L-BFGS had not come to rest after {settings.max_iterations} iterations")
        swept = {f"{c:g}": result["validation_accuracy"] for c, result in zip(tries, tried, strict=True)}
        return labels, found, {**figures, "C": tries[best], "validation_accuracy": swept, "converged": found.converged}

    def _commit(self, shards: list[tables.Shard], figures: dict[str, Any], seconds: float) -> tables.Record:
        rows = sum(shard.rows for shard in shards)
        if rows != self.total:
            raise AssertionError(f"rows in = {self.total}, but {rows} written: this is a defect in clipray")
        write_metrics(self.output, self.name, _metrics(figures), self.stamp)
        return tables.finish(
            self.table, "labels", self.schema, shards, fingerprint=self.stamp["fingerprint"], figures=figures,
            inputs={"rows": rows, "digest": self.digest, "input": self.source.name}, settings=self.identity,
            provenance=self.stamp, finished_at=tables.now(), seconds=round(seconds, 2),
            rows_per_s=round(rows / max(seconds, 1e-9), 2),
        )  # fmt: skip

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([*self.source.id_fields, *tables.arrow_schema("labels")])


def _metrics(figures: dict[str, Any]) -> list[Metric]:
    rows = figures.get("rows", {})
    found = [
        Metric("validation_accuracy", v, f"C={c}", rows["validation"])
        for c, v in figures.get("validation_accuracy", {}).items()
    ]
    found += [Metric("C", figures["C"])] if "C" in figures else []
    return found + [
        Metric(f"{name}_accuracy", figures[f"{name}_accuracy"], None, rows[name])
        for name in ("train", "test")
        if f"{name}_accuracy" in figures
    ]


def _try(item: tuple[ProbeStep, float]) -> dict[str, Any]:
    """Runs in a worker: train with one C, measured on the validation rows."""
    step, c = item
    rows = labelled_rows(step)
    x, codes = rows.of("train")
    found = pb.fit(x, codes, len(rows.labels), c, step.settings.max_iterations)
    return {"validation_accuracy": found.accuracy(*rows.of("validation"))}


def _finish(item: tuple[ProbeStep, float]) -> tuple[list[str], pb.Probe, dict[str, Any]]:
    """Runs in a worker: train with the best C on train and validation rows, measured on these and on the test rows."""
    step, c = item
    rows = labelled_rows(step)
    x, codes = rows.of("train", "validation")
    found = pb.fit(x, codes, len(rows.labels), c, step.settings.max_iterations)
    figures: dict[str, Any] = {"train_accuracy": found.accuracy(x, codes)}
    test = rows.of("test")
    if len(test[1]):
        figures["test_accuracy"] = found.accuracy(*test)
    counts = {"train": len(codes), "validation": len(rows.of("validation")[1]), "test": len(test[1])}
    return rows.labels, found, {**figures, "rows": counts}


@functools.lru_cache(maxsize=2)
def _read_probe(url: str, _mark: str) -> tuple[list[str], pb.Probe]:
    return read_probe(Folder(url))


def read_probe(folder: Folder) -> tuple[list[str], pb.Probe]:
    """Labels and coefficients of a trained probe."""
    data = tables.read_shard(folder, CLASSES)
    vectors = data["vector"].combine_chunks().flatten().to_numpy().reshape(len(data), -1)
    return data["label"].to_pylist(), pb.Probe(vectors, data["intercept"].to_numpy())


def _label_group(item: tuple[ProbeStep, list[Piece], list[str]]) -> list[tables.Shard]:
    """Runs in a worker: labels pieces and writes their rows."""
    step, group, (name,) = item
    labels, found = _read_probe(step.classes.url, step.stamp["fingerprint"] + step.digest)
    top, names, parts = min(step.settings.top, len(labels)), pa.array(labels, pa.string()), []
    for piece in group:
        ids, x = read_finite(step.source, piece)
        p = found.probabilities(x)
        order = np.argsort(-p, axis=1, kind="stable")[:, :top].astype(np.int32)
        best = np.take_along_axis(p, order, 1).astype(np.float32)
        parts.append(labels_table(ids, STYLE, names, order, best, step.schema))
    return [tables.write_shard(step.table, name, "labels", pa.concat_tables(parts), step.stamp)]


def prepare(settings: Probe, given: Given) -> ProbeStep:
    """Open the input, and the labels or the fit.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, or vectors and fit are of two spaces.
    """
    source = open_vectors(settings.input, given.output)
    if settings.truth is not None:
        truth, digest = mark_of(settings.truth, given.output)
        return ProbeStep(settings, given.output, source, truth, digest_of([source.digest, digest]), None)
    url = absolute(str(settings.fit)) if "/" in str(settings.fit) else given.output.sub(str(settings.fit)).url
    fitted = Folder(f"{url}_classes")
    record = finished(fitted, f"fit {settings.fit}")
    if record.table != "probe_classes":
        raise SchemaError(f"fit {settings.fit}: expected a probe, found {record.table} beside it")
    before, width = record.provenance["space"], read_probe(fitted)[1].vectors.shape[1]
    if width != source.n_features:
        raise SchemaError(
            f"{settings.name}: {settings.fit} was trained on vectors of {width}, {source.name} has {source.n_features}"
        )
    if before and source.space and before != source.space:
        raise SchemaError(
            f"{settings.name}: {settings.fit} was trained in another space than {source.name}: {'; '.join(changes(before, source.space))}"
        )
    return ProbeStep(settings, given.output, source, None, source.digest, fitted)
