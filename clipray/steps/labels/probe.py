"""Step `probe`: a vector column and known labels -> a table of labels, by a linear probe.

Each strength of the penalty is tried in a task of its own; the best is trained once more, with the validation rows. The
coefficients are a table, from which every worker labels its part. A kill costs what was not written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
from clipray.steps.base.shard_writer import write_rows
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
        how = f"C of {self.settings.c}" if self.fitted is None else f"fit {self.settings.fit}"
        return f"{super().description}, {how}"

    def make(self, run: RunContext) -> Outcome:
        """Train unless that is done, label. Raises SchemaError: too few rows or classes, or values not finite."""
        summary = self._trained(run)
        self.begin()
        return Outcome(write_rows(self, _labelled, self, run, "labelling"), summary, _metrics(summary))

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
        settings, ticker = self.settings, Ticker(run, self.name, self.total, "training")
        tries = sorted(set(settings.c))
        tried = list(ticker.map_tasks(_train, [(self, c, ("train",)) for c in tries]))
        accuracies = [summary["validation_accuracy"] for _, _, summary in tried]
        best = max(range(len(tries)), key=lambda n: (accuracies[n], -n))
        items = [(self, tries[best], ("train", "validation"))]
        labels, probe, summary = next(ticker.map_tasks(_train, items))
        if not probe.converged:
            run.say(f"{self.name}: L-BFGS had not come to rest after {settings.max_iterations} iterations")
        swept = {f"{c:g}": accuracy for c, accuracy in zip(tries, accuracies, strict=True)}
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


def _train(item: tuple[ProbeStep, float, Sequence[str]]) -> tuple[list[str], pb.LinearProbe, dict[str, Any]]:
    """Runs in a worker: train with one C on the rows of some splits. Labels, coefficients, and accuracies.

    The rows that it learnt from count as `train`.
    """
    step, c, names = item
    rows = labelled_rows(step.settings, step.source, step.output)
    splits = {"train": rows.of(*names), "validation": rows.of("validation"), "test": rows.of("test")}
    probe = pb.fit(*splits["train"], len(rows.labels), c, step.settings.max_iterations)
    counts = {name: len(codes) for name, (_, codes) in splits.items()}
    accuracies = {f"{name}_accuracy": probe.accuracy(*splits[name]) for name in splits if counts[name]}
    return rows.labels, probe, {**accuracies, "rows": counts}


@functools.lru_cache(maxsize=2)
def _read_probe(url: str, _mark: str) -> tuple[list[str], pb.LinearProbe]:
    return read_probe(Folder(url))


def read_probe(folder: Folder) -> tuple[list[str], pb.LinearProbe]:
    """Labels and coefficients of a trained probe."""
    data = tables.read_shard(folder, FILE)
    vectors = tables.matrix(data["vector"])
    return data["label"].to_pylist(), pb.LinearProbe(vectors, data["intercept"].to_numpy())


def _labelled(step: ProbeStep, ids: pa.Table, x: np.ndarray) -> pa.Table:
    """Runs in a worker: the rows of some vectors (n, d)."""
    labels, probe = _read_probe(step.companion.url, step.fingerprint + step.digest)
    p = probe.probabilities(x)
    order = np.argsort(-p, axis=1, kind="stable")[:, : step.settings.top].astype(np.int32)
    best = np.take_along_axis(p, order, 1).astype(np.float32)
    return labels_table(ids, STYLE, pa.array(labels, pa.string()), order, best, step.schema)


def open_step(settings: Probe, context: StepContext) -> ProbeStep:
    """Open the input, and the labels or the fit. Raises as `open_vectors`; SchemaError: the fit is of another space."""
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
