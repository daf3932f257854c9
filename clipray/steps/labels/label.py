"""Step `label`: CLIP vectors of images -> the `labels` table, by what is said of each class.

First a worker encodes what is said, into the table of classes. Then each part of the input is read once and labelled in
every style; a file holds the rows of one part in one style. A kill costs what was not written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.normalize import l2_normalize
from clipray.inputs.classes import prompt_styles
from clipray.inputs.vector_column import (
    open_vectors,
    read_finite,
    read_vectors,
    refuse_another_model,
)
from clipray.job import Label
from clipray.job.load import fingerprint
from clipray.steps.base.shard_writer import Part, write_parts
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.steps.labels.label_classes import PromptSet, read_classes, write_classes
from clipray.storage.parquet import chunked

if TYPE_CHECKING:
    from clipray.analysis.zero_shot import ZeroShot

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class LabelStep(VectorStep[Label]):
    """A `Step`; see `VectorStep`. Beside its table lie the classes."""

    table_type: ClassVar[str] = "labels"

    prompts: PromptSet

    @property
    def total(self) -> int:
        """A row for each row of the input and each style."""
        return self.source.n_samples * len(self.prompts.styles)

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "classes": self.prompts.identity}

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {**super().row_provenance, "classes": fingerprint(self.prompts.identity)}

    @property
    def description(self) -> str:
        styles = ", ".join(f"{style.name} ({len(style.labels)} classes)" for style in self.prompts.styles)
        return f"{super().description}, styles: {styles}"

    def make(self, run: RunContext) -> Outcome:
        """Encode the classes unless that is done, label what is missing.

        Raises:
            SchemaError: vectors that are not finite.
            JobError, ModelError: the model cannot label in this way.
        """
        self.begin()
        classes = write_classes(self.prompts, self.companion, self, run)
        if truncated := classes.provenance["prompts_truncated"]:
            run.say(f"{self.name}: {truncated} prompts were longer than the model reads, and cut")
        styles = {style.name: len(style.labels) for style in self.prompts.styles}
        groups = chunked(self.source.row_groups, self.settings.rows_per_file)
        parts = [Part(group, [f"part-{n:06d}-{style}.parquet" for style in styles]) for n, group in enumerate(groups)]
        return Outcome(write_parts(self, parts, label_part, self, run, "labelling"), {"styles": styles})


def open_step(settings: Label, context: StepContext) -> LabelStep:
    """Open input and classes. Raises as `open_vectors` and `prompt_styles`; SchemaError: vectors of another model."""
    source, model = open_vectors(settings.input, context.output), context.model(settings)
    refuse_another_model(source, model.identity(), model.embed_dim)
    styles = tuple(prompt_styles(settings.classes, settings.styles))
    prompts = PromptSet(model, context.text_precision(settings), styles, settings.multi_label)
    return LabelStep(settings, context.output, source, prompts)


def label_part(part: Part, step: LabelStep) -> list[tables.Shard]:
    """Runs in a worker: labels row groups in some styles and writes the rows of each."""
    styles = {name.removesuffix(".parquet").split("-", 2)[2]: name for name in part.names}
    rows: dict[str, list[pa.Table]] = {style: [] for style in styles}
    known = step.source.provenance.get("normalize") == "l2"
    for row_group in part.row_groups:
        ids, x = read_vectors(step.source, row_group)
        x = x if known and x.dtype == np.float32 else l2_normalize(x)
        for style in styles:
            rows[style].append(_labelled(step, style, ids, x))
            if not np.isfinite(rows[style][-1]["probability"].to_numpy()).all():
                read_finite(step.source, row_group)  # says which
    return [step.write(pa.concat_tables(rows[style]), name) for style, name in styles.items()]


@functools.lru_cache(maxsize=8)
def _classifier(url: str, mark: str, style: str, top: int, precision: Precision, alone: bool) -> ZeroShot:
    """A style's classes ready to label, once in a worker."""
    from clipray.analysis.zero_shot import ZeroShot

    classes = read_classes(url, mark)[style]
    bias = classes.logit_bias if alone and classes.negatives is None else None
    vectors, scale, negatives = classes.vectors, classes.logit_scale, classes.negatives
    return ZeroShot(vectors, scale, top=top, precision=precision, negatives=negatives, logit_bias=bias)


def _labelled(step: LabelStep, style: str, ids: pa.Table, x: np.ndarray) -> pa.Table:
    settings, multi = step.settings, step.settings.multi_label
    url, mark = step.companion.url, step.shard_metadata["classes"]
    best = _classifier(url, mark, style, settings.top, settings.precision, multi is not None).label(x)
    labels = read_classes(url, mark)[style].labels
    kept = None if multi is None else best.probabilities >= multi.threshold
    return labels_table(ids, style, labels, best.classes, best.probabilities, step.schema, kept)


def labels_table(
    ids: pa.Table, style: str, labels: pa.Array, classes: np.ndarray, p: np.ndarray, schema: pa.Schema,
    kept: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """Rows of the `labels` table.

    Args:
        labels: names of all classes. classes: (n, top), the most probable first. p: (n, top) float32, their probabilities.
        kept: (n, top) bool, which of them count as labels; None: all.
    """
    n, top = p.shape
    margin = p[:, 0] - p[:, 1] if top > 1 else p[:, 0]
    lengths = np.full(n, top) if kept is None else kept.sum(axis=1)
    flat = slice(None) if kept is None else kept.ravel()
    names = labels.take(pa.array(classes.ravel()[flat]))
    dtype = schema.field("top").type
    ranking = pa.StructArray.from_arrays([names, pa.array(p.ravel()[flat])], fields=list(dtype.value_type))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    best = labels.take(pa.array(classes[:, 0], mask=None if kept is None else ~kept[:, 0]))
    columns = [
        *ids.columns,
        pa.array([style], pa.string()).take(pa.array(np.zeros(n, np.int32))),
        best,
        pa.array(p[:, 0]),
        pa.array(margin),
        pa.ListArray.from_arrays(offsets, ranking, type=dtype),
    ]
    return pa.table(columns, schema=schema)
