"""Step `refer`: regions with captions -> the `referred` table: for each caption the box of its image that it fits best.

The regions of an image lie in one file, so each file of the input is a part of its own: a task encodes its captions and
goes from image to image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa

from clipray import tables
from clipray.analysis.normalize import l2_normalize
from clipray.analysis.referring import others, refer
from clipray.errors import SchemaError
from clipray.inputs.vector_column import open_vectors, read_finite, refuse_another_model
from clipray.job import Refer
from clipray.models.resolve import ResolvedModel
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.shard_writer import Part, write_parts
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.steps.labels.caption_draw import CAPTION, drawn_captions, encode_captions, mean_vector
from clipray.storage.parquet import RowGroup
from clipray.tables.metrics import Metric
from clipray.tables.scan import figures_of

BOX = "box_xyxy"
IDS = ("image_id", "region_id")


@dataclass(frozen=True)
class ReferStep(VectorStep[Refer]):
    """A `Step`; see `VectorStep`. precision: of the text tower."""

    table_type: ClassVar[str] = "referred"
    row_for_row: ClassVar[bool] = False

    model: ResolvedModel
    precision: str

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, "model": {**self.model.identity(), "precision": self.precision}}

    @property
    def schema(self) -> pa.Schema:
        return tables.arrow_schema("referred")

    @property
    def description(self) -> str:
        return f"captions and boxes of {self.total} regions from {self.source.name}"

    def make(self, run: RunContext) -> Outcome:
        """Compare file by file, measure. Raises SchemaError: vectors that are not finite; no region has a caption."""
        self.begin()
        by_file = itertools.groupby(self.source.row_groups, lambda row_group: row_group.path)
        files = [list(row_groups) for _, row_groups in by_file]
        parts = [Part(row_groups, [f"part-{n:06d}.parquet"]) for n, row_groups in enumerate(files)]
        task = Task(self, *self._dataset(files, run))
        shards = write_parts(self, parts, refer_file, task, run, "comparing")
        if not sum(shard.rows for shard in shards):
            source = f"input {self.source.name}"
            raise SchemaError(f"{source}: no region has a caption; `box_captions` of the manifest has them")
        measured = self._metrics(shards)
        summary: dict[str, Any] = {metric.metric: round(metric.value, 6) for metric in measured}
        if task.drawn:
            summary["captions_drawn"] = task.drawn
        return Outcome(shards, summary, measured)

    def _dataset(self, files: list[list[RowGroup]], run: RunContext) -> tuple[np.ndarray | None, int]:
        """The mean vector of captions drawn from the whole input, and how many; None where they are not wanted."""
        if self.settings.subtract != "dataset":
            return None, 0
        settings, ticker = self.settings, Ticker(run, self.name, self.total, "drawing captions")
        captions = drawn_captions(self.source, files, settings.dataset_captions, settings.random_state, ticker)
        if not captions:
            return None, 0
        texts = (self.model, self.precision, settings.template, captions)
        return next(ticker.map_tasks(mean_vector, [texts])), len(captions)

    def _metrics(self, shards: list[tables.Shard]) -> list[Metric]:
        """Accuracies; of images with a single box there is nothing to find."""
        correct, chance, several = pl.col("correct"), 1 / pl.col("boxes"), pl.col("boxes") > 1
        figures = figures_of(
            self.table,
            shards,
            accuracy=pl.struct(value=correct.mean(), n=pl.len()),
            accuracy_of_several=pl.struct(value=correct.filter(several).mean(), n=several.sum()),
            chance_of_several=pl.struct(value=chance.filter(several).mean(), n=several.sum()),
        )
        return [Metric(name, **figure) for name, figure in figures.items() if figure["n"]]


def open_step(settings: Refer, context: StepContext) -> ReferStep:
    """Open the regions. Raises as `open_vectors`; SchemaError: they are of another model, or have no captions."""
    source, model = open_vectors(settings.input, context.output), context.model(settings)
    refuse_another_model(source, model.identity(), model.embed_dim)
    missing = [name for name in (*IDS, BOX, CAPTION) if name not in source.schema.names]
    if missing:
        raise SchemaError(
            f"input {source.name}: no column `{missing[0]}`; expected regions with captions: `embed_regions` writes them, "
            f"from a manifest with `boxes` and `box_captions`; found: {', '.join(source.schema.names)}"
        )
    return ReferStep(settings, context.output, source, model, context.text_precision(settings))


@dataclass(frozen=True, eq=False)
class Task:
    """What a worker must know. dataset: (d,) float32, mean vector of `drawn` captions, where that is subtracted."""

    step: ReferStep
    dataset: np.ndarray | None
    drawn: int


def refer_file(part: Part, task: Task) -> list[tables.Shard]:
    """Runs in a worker: the captions of one file's images."""
    step, wanted = task.step, (*IDS, BOX, CAPTION)
    read = [read_finite(step.source, row_group, wanted) for row_group in part.row_groups]
    regions, x = pa.concat_tables([ids for ids, _ in read]), l2_normalize(np.concatenate([x for _, x in read]))
    captions = regions[CAPTION].to_pylist()
    texts = list(dict.fromkeys(text for text in captions if text and text.strip()))
    vectors = encode_captions(step.model, step.precision, step.settings.template, texts)
    place = {text: n for n, text in enumerate(texts)}
    rows: list[dict[str, Any]] = []
    images = pl.DataFrame({"image_id": pl.Series(regions["image_id"])}).with_row_index("region")
    for image in images.partition_by("image_id"):
        of_image = image["region"].to_numpy()
        rows += _of_image(regions, x, of_image, [place.get(captions[n]) for n in of_image], vectors, task)
    return [step.write(pa.Table.from_pylist(rows, schema=step.schema), *part.names)]


def _of_image(
    regions: pa.Table, x: np.ndarray, rows: np.ndarray, captions: list[int | None], vectors: np.ndarray, task: Task
) -> Iterator[dict[str, Any]]:
    """A row for each region that has a caption. captions: places in `vectors`."""
    captioned = [n for n, place in enumerate(captions) if place is not None]
    if not captioned:
        return
    boxes = regions.take(pa.array(rows)).select([*IDS, BOX, CAPTION]).to_pylist()
    similarity = x[rows] @ vectors[[place for place in captions if place is not None]].T  # (boxes, captions)
    choice = refer(similarity, _baseline(task, similarity, x[rows]))
    for m, n in enumerate(captioned):
        best = int(choice.best[m])
        margin = float(choice.margin[m])
        yield {
            **boxes[best],
            CAPTION: boxes[n][CAPTION],
            "similarity": float(similarity[best, m]),
            "score": float(choice.scores[best, m]),
            "margin": None if np.isnan(margin) else margin,
            "boxes": len(rows),
            "truth": boxes[n]["region_id"],
            "rank": choice.rank(n, m),
            "correct": boxes[best][CAPTION] == boxes[n][CAPTION],
        }


def _baseline(task: Task, similarity: np.ndarray, x: np.ndarray) -> np.ndarray | float:
    """What each of an image's boxes has with any caption; x: (b, d), their vectors."""
    if task.dataset is not None:
        return (x @ task.dataset)[:, None]
    return others(similarity) if task.step.settings.subtract == "others" else 0.0
