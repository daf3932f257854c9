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
from clipray.inputs.vector_column import open_vectors
from clipray.job import Probe
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.shard_writer import Part, numbered, write_parts, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import FILE, Outcome, VectorStep, open_fit, refuse_other_fit
from clipray.steps.labels.label import labels_table
from clipray.steps.labels.probe_rows import labelled_rows
from clipray.storage.folder import Folder
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

STYLE = "probe"


@dataclass(frozen=True)
class ProbeStep(VectorStep[Probe]):
    """A `Step`; see `VectorStep`. Beside its table lie the coefficients.

    Attributes:
        truth: what decides the known labels, and the digest of their files.
        fitted: the coefficients to apply, where they are another run's.
    """

    table_type: ClassVar[str] = "labels"
    companion_type: ClassVar[str] = "probe_classes"

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

    @property
    def description(self) -> str:
        source, how = self.source, f"C of {self.settings.c}" if self.fitted is None else f"fit {self.settings.fit}"
        return f"{source.n_samples} vectors of {source.n_features} from {source.name}, {how}"

    def make(self, run: RunContext) -> Outcome:
        """Train unless that is done, label what is missing.

        Raises:
            SchemaError: too few rows or classes to train on, or vectors that are not finite.
        """
        summary = self._trained(run)
        self.begin()
        parts = numbered(self.source.row_groups, self.settings.rows_per_file)
        return Outcome(write_parts(self, parts, _label, self, run, "labelling"), summary, _metrics(summary))

    def _trained(self, run: RunContext) -> dict[str, Any]:
        """Have the coefficients in their table; the summary of training."""
        record = self.finished_companion()
        if record is not None:
            return record.summary
        if self.fitted is not None:
            labels, probe, summary = *read_probe(self.fitted[0]), {"fit": self.settings.fit}
        else:
            labels, probe, summary = self._fit(run)
        schema = tables.arrow_schema(self.companion_type, {"vector": self.source.n_features}, element="float64")
        vectors = tables.vector_array(probe.vectors, schema.field("vector").type)
        self.write_companion(pa.table([pa.array(labels), pa.array(probe.intercepts), vectors], schema=schema), summary)
        return summary

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
        labels, probe, summary = next(map_tasks(_finish, [(self, tries[best])], cpus, lambda _: ticker.at(0, 0)))
        if not probe.converged:
            run.say(f"{self.name}: L-BFGS had not come to rest after {settings.max_iterations} iterations")
        swept = {f"{c:g}": result["validation_accuracy"] for c, result in zip(tries, tried, strict=True)}
        return labels, probe, {**summary, "C": tries[best], "validation_accuracy": swept, "converged": probe.converged}


def _metrics(summary: dict[str, Any]) -> list[Metric]:
    rows = summary.get("rows", {})
    metrics = [
        Metric("validation_accuracy", v, f"C={c}", rows["validation"])
        for c, v in summary.get("validation_accuracy", {}).items()
    ]
    metrics += [Metric("C", summary["C"])] if "C" in summary else []
    return metrics + [
        Metric(f"{name}_accuracy", summary[f"{name}_accuracy"], None, rows[name])
        for name in ("train", "test")
        if f"{name}_accuracy" in summary
    ]


def _try(item: tuple[ProbeStep, float]) -> dict[str, Any]:
    """Runs in a worker: train with one C, measured on the validation rows."""
    step, c = item
    rows = labelled_rows(step.settings, step.source, step.output)
    x, codes = rows.of("train")
    probe = pb.fit(x, codes, len(rows.labels), c, step.settings.max_iterations)
    return {"validation_accuracy": probe.accuracy(*rows.of("validation"))}


def _finish(item: tuple[ProbeStep, float]) -> tuple[list[str], pb.LinearProbe, dict[str, Any]]:
    """Runs in a worker: train with the best C on train and validation rows, measured on these and on the test rows."""
    step, c = item
    rows = labelled_rows(step.settings, step.source, step.output)
    x, codes = rows.of("train", "validation")
    probe = pb.fit(x, codes, len(rows.labels), c, step.settings.max_iterations)
    summary: dict[str, Any] = {"train_accuracy": probe.accuracy(x, codes)}
    test = rows.of("test")
    if len(test[1]):
        summary["test_accuracy"] = probe.accuracy(*test)
    counts = {"train": len(codes), "validation": len(rows.of("validation")[1]), "test": len(test[1])}
    return rows.labels, probe, {**summary, "rows": counts}


@functools.lru_cache(maxsize=2)
def _read_probe(url: str, _mark: str) -> tuple[list[str], pb.LinearProbe]:
    return read_probe(Folder(url))


def read_probe(folder: Folder) -> tuple[list[str], pb.LinearProbe]:
    """Labels and coefficients of a trained probe."""
    data = tables.read_shard(folder, FILE)
    vectors = tables.matrix(data["vector"])
    return data["label"].to_pylist(), pb.LinearProbe(vectors, data["intercept"].to_numpy())


def _label(part: Part, step: ProbeStep) -> list[tables.Shard]:
    """Runs in a worker: labels the part's vectors and writes their rows."""
    labels, probe = _read_probe(step.companion.url, step.fingerprint + step.digest)
    top, names = min(step.settings.top, len(labels)), pa.array(labels, pa.string())

    def labelled(ids: pa.Table, x: np.ndarray) -> pa.Table:
        p = probe.probabilities(x)
        order = np.argsort(-p, axis=1, kind="stable")[:, :top].astype(np.int32)
        best = np.take_along_axis(p, order, 1).astype(np.float32)
        return labels_table(ids, STYLE, names, order, best, step.schema)

    return write_rows(step, part, labelled)


def open_step(settings: Probe, context: StepContext) -> ProbeStep:
    """Open the input, and the labels or the fit.

    Raises:
        JobError, SchemaError, ManifestError: one of them is not there, or vectors and fit are of two spaces.
    """
    source = open_vectors(settings.input, context.output)
    if settings.fit is None:
        assert settings.truth is not None
        return ProbeStep(settings, context.output, source, fingerprint_of(settings.truth, context.output), None)
    fitted, record = open_fit(settings.fit, "classes", context.output)
    if record.table != "probe_classes":
        raise SchemaError(f"fit {settings.fit}: expected a probe, found {record.table} beside it")
    width = read_probe(fitted)[1].vectors.shape[1]
    refuse_other_fit(settings.name, settings.fit, width, record.provenance["space"], source)
    return ProbeStep(settings, context.output, source, None, (fitted, record))
