"""Step `attack`: images with labels -> the `attacks` table: what a written word does to their zero-shot labels.

Images take the way of `embed_images`. Between decoding and preprocessing each is copied, and the name of a wrong class
is written on the copy; both are encoded and labelled by the same class vectors, and only labels come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from clipray.errors import JobError, ManifestError, listed
from clipray.inputs.classes import prompt_styles
from clipray.inputs.committed_rows import CommittedRows
from clipray.inputs.manifest import Manifest, open_manifest, read_rows
from clipray.inputs.parquet_files import is_text
from clipray.inputs.row_index import SCAN_BYTES, SCAN_ROWS
from clipray.job import Attack, Feature, Style
from clipray.job.load import fingerprint
from clipray.job.row_spec import ATTACKS
from clipray.pipelines.spec import AttackSpec, Limits
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.labels.label_classes import PromptSet, read_classes, write_classes
from clipray.storage.folder import Folder
from clipray.storage.parquet import merge_neighbours
from clipray.tables.metrics import Metric, write_metrics
from clipray.tables.scan import figures_of

if TYPE_CHECKING:
    from clipray.analysis.zero_shot import ZeroShot

LABEL = "label"


@dataclass(frozen=True)
class AttackStep(EncodeStep[Attack]):
    """What a typographic attack does to labels."""

    prompts: PromptSet

    @property
    def classes(self) -> Folder:
        return self.output.sub(f"{self.name}_classes")

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "classes": self.prompts.identity}

    @property
    def kept_fields(self) -> list[pa.Field]:
        return [field for field in super().kept_fields if field.name != LABEL]  # one of the fixed columns

    @property
    def row_provenance(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "classes": fingerprint(self.prompts.identity),
            "lettering": settings.lettering.model_dump(mode="json"),
            "seed": settings.seed,
        }

    def encoder(self) -> AttackSpec:
        settings, style = self.settings, self.prompts.styles[0]
        return AttackSpec(
            model=self.model,
            limits=Limits.of(settings, settings.max_pixels),
            features={"clip": Feature()},
            schema=self.schema,
            labels=style.labels,
            classifier=partial(_classifier, self.classes.url, fingerprint(self.prompts.identity), style.name),
            lettering=settings.lettering,
            own_label=settings.word == "own",
            seed=settings.seed,
        )

    def before_encoding(self, run: RunContext) -> None:
        """Encode the classes unless that is done."""
        write_classes(self.prompts, self.classes, self, run)

    def summarize(self, committed: CommittedRows, provenance: dict[str, Any]) -> dict[str, Any]:
        """Rates over all rows."""
        before, after, label = pl.col("before"), pl.col("after"), pl.col(LABEL)
        flipped, to_word = after != before, after == pl.col("word")
        rates = figures_of(
            self.table,
            committed.files,
            flip_rate=flipped.mean(),
            flip_rate_to_word=(flipped & to_word).mean(),
            flip_rate_elsewhere=(flipped & ~to_word).mean(),
            accuracy_before=(before == label).mean(),
            accuracy_after=(after == label).mean(),
        )
        metrics = [Metric(name, rate, n=committed.rows) for name, rate in rates.items()]
        write_metrics(self.output, self.name, metrics, provenance)
        return {name: round(rate, 6) for name, rate in rates.items()}


def open_step(settings: Attack, context: StepContext) -> AttackStep:
    """Open and count the images, read the classes, check that the labels are among them.

    Raises:
        ManifestError: no images there, no labels, or labels that are no classes.
        JobError: classes that cannot be read, or a single one.
    """
    manifest = open_manifest(settings.manifest, settings.keep, [LABEL], ATTACKS)
    style = settings.style
    styles = prompt_styles(settings.classes, {"attack": style} if isinstance(style, Style) else [style])
    _check_labels(manifest, styles[0].labels)
    prompts = PromptSet(context.model(settings), context.text_precision(settings), tuple(styles[:1]), None)
    return AttackStep.of(settings, context, manifest, (LABEL, *settings.keep), prompts=prompts)


def _classifier(url: str, mark: str, style: str) -> ZeroShot:
    """For a worker."""
    from clipray.analysis.zero_shot import ZeroShot

    classes = read_classes(url, mark)[style]
    return ZeroShot(classes.vectors, classes.logit_scale, top=1, precision="fp32")


def _check_labels(manifest: Manifest, labels: tuple[str, ...]) -> None:
    if not manifest.has(LABEL, is_text, "string"):
        raise ManifestError(f"{manifest.urls[0]}: no column `{LABEL}`; found: {', '.join(manifest.schema.names)}")
    if len(labels) < 2:
        raise JobError(f"classes: {len(labels)} of them; expected two or more, as a wrong one is written on each image")
    names: set[str] = set()
    for row_group in merge_neighbours(manifest.row_groups, SCAN_ROWS, SCAN_BYTES):
        for rows in read_rows(row_group, [LABEL], SCAN_ROWS, manifest.layout, manifest.schema):
            readable = ~rows.not_utf8.get(LABEL, np.zeros(len(rows.table), bool))
            column = rows.table[LABEL].filter(pa.array(readable)).cast(pa.string())
            names.update(pc.unique(column).drop_null().to_pylist())
    unknown = sorted(names - set(labels))
    if unknown:
        raise ManifestError(
            f"{manifest.urls[0]}: labels that are no classes: {listed(unknown)}; {len(labels)} classes are known"
        )
