"""Step `evaluate_labels`: tables of labels and what is known -> `label_figures`, and what was taken for what.

The labels are read once, shard by shard, in the driver, which keeps 12 bytes of each row with a known label, and one more
for each style. Figures and their intervals come from counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa

from clipray import tables
from clipray.analysis import label_figures as lf
from clipray.errors import JobError
from clipray.inputs.known_labels import KnownLabels, fingerprint_of, read_labelled
from clipray.job import EvaluateLabels
from clipray.report import plots
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, TableStep
from clipray.steps.labels.label_tally import UNLABELLED, Entry, LabelTable, open_labels, tally
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

DRAWN_CLASSES = 1_000  # of a confusion matrix, at most


@dataclass(frozen=True)
class EvaluateLabelsStep(TableStep[EvaluateLabels]):
    """A `Step`; see `TableStep`. Beside its table lies the confusion.

    Attributes:
        opened: the tables of labels, by what the job calls them.
        compared: of each data set what made its labels and its truth. files: the digest of all of them.
    """

    table_type: ClassVar[str] = "label_figures"
    companion_type: ClassVar[str] = "confusion"
    row_for_row: ClassVar[bool] = False

    opened: dict[str, LabelTable]
    compared: dict[str, Any]
    files: Digest

    @property
    def total(self) -> int:
        """Rows of labels."""
        return sum(table.record.rows for table in self.opened.values())

    @property
    def inputs_digest(self) -> Digest:
        return self.files

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {"inputs": self.compared}

    @property
    def row_provenance(self) -> dict[str, Any]:
        return self.input_fingerprint

    @property
    def inputs(self) -> list[str]:
        return list(self.opened)

    @property
    def description(self) -> str:
        return f"{self.total} rows of {', '.join(self.opened)}"

    def make(self, run: RunContext) -> Outcome:
        """Read, count, compare. Raises SchemaError: labels and what is known do not fit together."""
        entries, baselines = self._tallied(Ticker(run, self.name, self.total, "counting"))
        rows = [
            row for entry in entries for row in self._rows(entry, _baseline(self.settings, entry, entries, baselines))
        ]
        self.begin(keep=False)
        return self._written(entries, rows)

    def _tallied(self, ticker: Ticker) -> tuple[list[Entry], dict[str, list[Entry]]]:
        """All styles of all data sets, and those of the tables that a data set is compared with."""
        settings, known, done = self.settings, dict[str, KnownLabels](), 0
        entries, baselines = list[Entry](), dict[str, list[Entry]]()
        for name, data in settings.data_sets.items():
            source = data.truth if isinstance(data.truth, str) else data.truth.model_dump_json()
            if source not in known:
                known[source] = read_labelled(data.truth, self.output, settings.by)
            prefix = None if settings.by is None else "" if len(settings.data_sets) == 1 else f"{name}/"
            entries += tally(name, self.opened[data.labels], known[source], prefix)
            if data.baseline:
                for entry in tally(name, self.opened[data.baseline], known[source], prefix):
                    baselines.setdefault(entry.data_set, []).append(entry)
            done += self.opened[data.labels].record.rows
            ticker.at(done, 0)
        return entries, baselines

    def _rows(self, entry: Entry, other: tuple[str, Entry] | None) -> Iterator[dict[str, Any]]:
        """The figures of an entry, as rows of the table."""
        settings = self.settings
        drawn = lf.bootstrap(entry.state, settings.bootstrap, settings.random_state)
        against = self._difference(entry, other[1], drawn) if other else {}
        told = {*(f"top{top}" for top in entry.table.tops), "mean_per_class", "ece"}
        for metric, value in lf.figures(entry.state).items():
            if metric not in told:
                continue
            low, high = lf.interval(drawn[metric], settings.confidence)
            less, bounds = against.get(metric, (None, (None, None)))
            yield {
                "data_set": entry.data_set, "style": entry.style, "metric": metric, "value": value, "low": low, "high": high,
                "n": entry.state.n, "baseline": other[0] if other and less is not None else None, "difference": less,
                "difference_low": bounds[0], "difference_high": bounds[1],
            }  # fmt: skip

    def _difference(self, a: Entry, b: Entry, drawn: dict[str, np.ndarray]) -> dict[str, tuple[float, Any]]:
        """By metric the difference and its interval: over the rows that both have, or, of other rows, drawn apart."""
        settings = self.settings
        if a.truth is b.truth and a.group == b.group and a.table.classes == b.table.classes:
            both = np.flatnonzero((a.ranks != UNLABELLED) & (b.ranks != UNLABELLED) & (a.truth.group_codes == a.group))
            cells = lf.joint_cells(a.codes[both], a.ranks[both], b.ranks[both], len(a.table.classes))
            values = lf.differences(lf.accuracies(cells.sum(axis=-1)), lf.accuracies(cells.sum(axis=-2)))
            samples = lf.paired_differences(cells, settings.bootstrap, settings.random_state)
        else:
            theirs = lf.figures(b.state)
            values = {name: np.array(value - theirs[name]) for name, value in lf.figures(a.state).items()}
            samples = lf.differences(drawn, lf.bootstrap(b.state, settings.bootstrap, settings.random_state + 1))
        tops = {f"top{top}" for top in set(lf.TOPS) - set(b.table.tops)}
        return {
            name: (float(values[name]), lf.interval(samples[name], settings.confidence))
            for name in samples
            if name not in tops
        }

    def _written(self, entries: list[Entry], rows: list[dict[str, Any]]) -> Outcome:
        confusion = pl.concat([entry.confusion() for entry in entries]).to_arrow()
        for entry in entries:
            self._draw(entry)
        self.write_companion(confusion.cast(tables.arrow_schema(self.companion_type)))
        shard = self.write(pa.Table.from_pylist(rows, schema=self.schema))
        unlabelled = {
            f"{e.data_set}/{e.style}": int(((e.ranks == UNLABELLED) & (e.truth.group_codes == e.group)).sum())
            for e in entries
        }
        top1 = {f"{r['data_set']}/{r['style']}": round(r["value"], 6) for r in rows if r["metric"] == "top1"}
        summary = {"top1": top1, "known_but_not_labelled": unlabelled}
        metrics = [Metric(row["metric"], row["value"], f"{row['data_set']}/{row['style']}", row["n"]) for row in rows]
        return Outcome([shard], summary, metrics)

    def _draw(self, entry: Entry) -> None:
        """The confusion matrix as an image, beside its table."""
        classes = entry.table.classes
        if len(classes) > DRAWN_CLASSES:
            return
        counts, pairs = np.zeros((len(classes),) * 2, np.int64), entry.pairs.drop_nulls("predicted")
        counts[pairs["known"].to_numpy(), pairs["predicted"].to_numpy()] = pairs["n"].to_numpy()
        title = f"{entry.data_set}, {entry.style}: {lf.figures(entry.state)['top1']:.1%} of {entry.state.n} right"
        name = re.sub(r"[^\w.-]+", "_", f"{entry.data_set}-{entry.style}")
        self.companion.write(f"{name}.png", plots.confusion(counts, classes, title=title))


def _baseline(
    settings: EvaluateLabels, entry: Entry, entries: list[Entry], baselines: dict[str, list[Entry]]
) -> tuple[str, Entry] | None:
    """What an entry is compared with, and its name: its own baseline, the data set or the style that the job names."""
    of_set = baselines.get(entry.data_set, [])
    baseline = next((e for e in of_set if e.style == entry.style), of_set[0] if len(of_set) == 1 else None)
    if baseline:
        return baseline.table.name, baseline
    wanted = settings.baseline
    if wanted is None or wanted in (entry.data_set, entry.style):
        return None
    others = ((wanted, entry.style), (entry.data_set, wanted))
    for other in entries:
        if (other.data_set, other.style) in others:
            return wanted, other
    known = dict.fromkeys([*(e.data_set for e in entries), *(e.style for e in entries)])
    if wanted not in known:
        raise JobError(
            f"{settings.name}: baseline {wanted!r} is no data set and no style; there are: {', '.join(known)}"
        )
    return None


def open_step(settings: EvaluateLabels, context: StepContext) -> EvaluateLabelsStep:
    """Open the tables of labels. Raises JobError, SchemaError, ManifestError: an input is not there, or is none."""
    opened: dict[str, LabelTable] = {}
    compared: dict[str, Any] = {}
    files: list[Any] = []
    for name, data in settings.data_sets.items():
        truth, digest = fingerprint_of(data.truth, context.output)
        compared[name] = {"truth": truth}
        files.append(digest)
        for role, table in {"labels": data.labels, "baseline": data.baseline}.items():
            if table is not None:
                opened.setdefault(table, open_labels(table, context.output))
                compared[name][role] = opened[table].record.fingerprint
                files.append(opened[table].record.files)
    return EvaluateLabelsStep(settings, context.output, opened, compared, combined(files))
