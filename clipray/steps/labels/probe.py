"""Step `probe`: a vector column and known labels -> a table of labels, by a linear probe.

Each strength of the penalty is tried in a task of its own; the best is trained once more, with the validation rows. The
coefficients are a table, from which every worker labels its part. A kill costs what was not written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis import probe as pb
from clipray.errors import SchemaError
from clipray.inputs.known_labels import fingerprint_of
from clipray.inputs.vector_column import open_vectors, read_finite
from clipray.job import Probe
from clipray.steps.base.shard_writer import make_parts, numbered
from clipray.steps.base.step import RunContext, StepContext, Ticker
from clipray.steps.base.table_step import VectorStep, open_fit, refuse_other_fit
from clipray.steps.labels.label import labels_table
from clipray.steps.labels.probe_rows import labelled_rows
from clipray.storage.folder import Folder
from clipray.storage.parquet import RowGroup
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

CLASSES = "part-000000.parquet"
STYLE = "probe"


@dataclass(frozen=True)
class ProbeStep(VectorStep[Probe]):
    """A `Step`; see `VectorStep`. Beside its table lie the coefficients.

    Attributes:
        truth: what decides the known labels, and the digest of their files.
        fitted: the coefficients to apply, where they are another run's.
    """

    kind: ClassVar[str] = "labels"

    truth: tuple[dict[str, Any], Digest] | None
    fitted: tuple[Folder, tables.Record] | None

    @property
    def inputs_digest(self) -> Digest:
        """Of the vectors' files, and of those of the known labels."""
        return combined([self.source.digest, self.truth[1]]) if self.truth else self.source.digest

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        truth = {"truth": self.truth[0]} if self.truth else {}
        return {**super().input_fingerprint, **truth, **({"fit": self.fitted[1].fingerprint} if self.fitted else {})}

    def describe(self, cluster: Any) -> list[str]:  # noqa: ARG002 - of the protocol
        source, how = self.source, f"C of {self.settings.c}" if self.fitted is None else f"fit {self.settings.fit}"
        return [f"{self.name}: {source.n_samples} vectors of {source.n_features} from {source.name}, {how}"]

    def make(self, run: RunContext, began: float) -> tables.Record:
        """Train unless that is done, label what is missing, commit.

        Raises:
            SchemaError: too few rows or classes to train on, or vectors that are not finite.
        """
        figures = self._trained(run)
        self.begin()
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        shards = make_parts(self, parts, self.stamp, _label_group, run, "labelling")
        return self.commit(shards, began, figures=figures, metrics=_metrics(figures))

    def _trained(self, run: RunContext) -> dict[str, Any]:
        """Have the coefficients in their table; the figures of training."""
        record = tables.record_to_go_on(self.beside)
        if (
            record is not None
            and tables.intact(self.beside, record)
            and tables.shard_is(self.beside, CLASSES, self.stamp)
        ):
            return record.figures
        if self.fitted is not None:
            labels, found, figures = *read_probe(self.fitted[0]), {"fit": self.settings.fit}
        else:
            labels, found, figures = self._fit(run)
        tables.clear(self.beside, "probe_classes")
        schema = tables.arrow_schema("probe_classes", {"vector": self.source.n_features}, element="float64")
        vectors = tables.vector_array(found.vectors, schema.field("vector").type)
        data = pa.table([pa.array(labels), pa.array(found.intercepts), vectors], schema=schema)
        shard = tables.write_shard(self.beside, CLASSES, "probe_classes", data, self.stamp)
        self.finish(self.beside, "probe_classes", schema, [shard], figures)
        return figures

    def _fit(self, run: RunContext) -> tuple[list[str], pb.LinearProbe, dict[str, Any]]:
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


def _finish(item: tuple[ProbeStep, float]) -> tuple[list[str], pb.LinearProbe, dict[str, Any]]:
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
def _read_probe(url: str, _mark: str) -> tuple[list[str], pb.LinearProbe]:
    return read_probe(Folder(url))


def read_probe(folder: Folder) -> tuple[list[str], pb.LinearProbe]:
    """Labels and coefficients of a trained probe."""
    data = tables.read_shard(folder, CLASSES)
    vectors = data["vector"].combine_chunks().flatten().to_numpy().reshape(len(data), -1)
    return data["label"].to_pylist(), pb.LinearProbe(vectors, data["intercept"].to_numpy())


def _label_group(item: tuple[ProbeStep, list[RowGroup], list[str]]) -> list[tables.Shard]:
    """Runs in a worker: labels row groups and writes their rows."""
    step, group, (name,) = item
    labels, found = _read_probe(step.beside.url, step.stamp["fingerprint"] + step.digest)
    top, names, parts = min(step.settings.top, len(labels)), pa.array(labels, pa.string()), []
    for row_group in group:
        ids, x = read_finite(step.source, row_group)
        p = found.probabilities(x)
        order = np.argsort(-p, axis=1, kind="stable")[:, :top].astype(np.int32)
        best = np.take_along_axis(p, order, 1).astype(np.float32)
        parts.append(labels_table(ids, STYLE, names, order, best, step.schema))
    return [tables.write_shard(step.table, name, "labels", pa.concat_tables(parts), step.stamp)]


def prepare(settings: Probe, given: StepContext) -> ProbeStep:
    """Open the input, and the labels or the fit.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, or vectors and fit are of two spaces.
    """
    source = open_vectors(settings.input, given.output)
    if settings.fit is None:
        assert settings.truth is not None
        return ProbeStep(settings, given.output, source, fingerprint_of(settings.truth, given.output), None)
    fitted, record = open_fit(settings.fit, "classes", given.output)
    if record.table != "probe_classes":
        raise SchemaError(f"fit {settings.fit}: expected a probe, found {record.table} beside it")
    width = read_probe(fitted)[1].vectors.shape[1]
    refuse_other_fit(settings.name, settings.fit, width, record.provenance["space"], source)
    return ProbeStep(settings, given.output, source, None, (fitted, record))
