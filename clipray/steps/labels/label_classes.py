"""The classes of a `label` step as a table of their vectors, made once, by a worker, and read by all others."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.analysis.prompts import PromptStyle
from clipray.errors import JobError
from clipray.job import MultiLabel
from clipray.job.load import fingerprint
from clipray.models.resolve import ResolvedModel, provenance
from clipray.pipelines.spec import ClassTexts
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.step import RunContext, Step
from clipray.storage.folder import Folder

CLASSES = "part-000000.parquet"
TEXTS_OF_A_TASK = 4_096  # that make it worthwhile to load a text tower


@dataclass(frozen=True)
class PromptSet:
    """All that is said, and by which network: what decides the class vectors.

    Attributes:
        precision: of the text tower.
    """

    model: ResolvedModel
    precision: str
    styles: tuple[PromptStyle, ...]
    multi_label: MultiLabel | None

    @property
    def identity(self) -> dict[str, Any]:
        negative = self.multi_label.negative if self.multi_label else None
        styles = {style.name: style.digest() for style in self.styles}
        return {"model": self.model.identity(), "precision": self.precision, "styles": styles, "negative": negative}

    def negatives(self) -> list[PromptStyle]:
        """What is said of images that do not show a class: a text for all, or one for each."""
        text = self.multi_label.negative if self.multi_label else None
        if text is None:
            return []
        if "{}" in text:
            return [PromptStyle(style.name, style.labels, templates=(text,)) for style in self.styles]
        return [PromptStyle(style.name, ("",), descriptions=((text,),)) for style in self.styles]


@dataclass(frozen=True, eq=False)
class ClassVectors:
    """The classes of a style: names, (k, d) float32, and (k, d) or (1, d) of their negatives."""

    labels: pa.Array
    vectors: np.ndarray
    negatives: np.ndarray | None
    logit_scale: float
    logit_bias: float | None


def write_classes(prompts: PromptSet, folder: Folder, step: Step[Any], run: RunContext) -> tables.Record:
    """Encode the classes in workers and write their table, unless it is there; its record."""
    from clipray.engine.workers import encode_classes

    mark = fingerprint(prompts.identity)
    record = tables.whole_record(folder)
    if record is not None and record.fingerprint == mark:
        return record
    tables.clear(folder, "label_classes")
    styles = [*prompts.styles, *prompts.negatives()]
    ticker = Ticker(run, step.name, step.total, "encoding classes")
    encoded = list(ticker.map_tasks(encode_classes, _items(prompts, styles, run.cluster().cpus)))
    facts = encoded[0].facts
    if prompts.multi_label and prompts.multi_label.negative is None and facts["logit_bias"] is None:
        raise JobError(
            f"multi_label: {prompts.model.name} has no logit_bias of its own: give a `negative`, such as 'a photo'"
        )
    rows = [
        _rows(style, n >= len(prompts.styles), [part.parts[n] for part in encoded], prompts.model.embed_dim)
        for n, style in enumerate(styles)
    ]
    origin = provenance(prompts.model)
    versions = {"clipray": __version__, **origin["versions"]}
    metadata = {"fingerprint": mark, "model": origin["model"], **facts, "versions": versions}
    data = pa.concat_tables(rows)
    shard = tables.write_shard(folder, CLASSES, "label_classes", data, metadata)
    return tables.commit(
        folder, "label_classes", data.schema, [shard], fingerprint=mark, inputs={"rows": len(data)},
        settings=prompts.identity, provenance=metadata, finished_at=tables.now(),
    )  # fmt: skip


def _items(prompts: PromptSet, styles: Sequence[PromptStyle], cpus: float) -> list[ClassTexts]:
    """Work for as many tasks as are worthwhile: of each style a range of its classes."""
    texts = sum(len(style.labels) * max(1, len(style.templates)) for style in styles)
    parts = int(max(1, min(cpus, texts // TEXTS_OF_A_TASK)))
    threads = max(1, int(cpus / parts))

    def edges(style: PromptStyle, part: int) -> tuple[PromptStyle, int, int]:
        k = len(style.labels)
        return style, part * k // parts, (part + 1) * k // parts

    return [
        ClassTexts(prompts.model, prompts.precision, threads, tuple(edges(s, n) for s in styles)) for n in range(parts)
    ]


def _rows(style: PromptStyle, negative: bool, parts: Sequence[tuple[np.ndarray, np.ndarray]], width: int) -> pa.Table:
    schema = tables.arrow_schema("label_classes", {"vector": width})
    vectors, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    labels = [label or None for label in style.labels]
    columns = [
        pa.array([style.name] * len(labels), pa.string()),
        pa.array(labels, pa.string()),
        pa.array([negative] * len(labels)),
        pa.array(counts, pa.int32()),
        tables.vector_array(vectors, schema.field("vector").type),
    ]
    return pa.table(columns, schema=schema)


@functools.lru_cache(maxsize=2)
def read_classes(url: str, mark: str) -> dict[str, ClassVectors]:
    """The classes of each style, once in a worker. `mark`: their fingerprint."""
    data = tables.read_shard(Folder(url), CLASSES)
    metadata = tables.shard_footer(Folder(url), CLASSES)[2]
    if metadata.get("fingerprint") != mark:
        raise AssertionError(f"{url}: classes of another job")
    by_style = {}
    styles, negative, vectors = data["style"].to_numpy(), data["negative"].to_numpy(), tables.matrix(data["vector"])
    for style in dict.fromkeys(styles.tolist()):
        of_style = (styles == style) & ~negative
        against = vectors[(styles == style) & negative]
        labels = data["label"].combine_chunks().filter(pa.array(of_style))
        scale, bias = metadata["logit_scale"], metadata["logit_bias"]
        by_style[style] = ClassVectors(labels, vectors[of_style], against if len(against) else None, scale, bias)
    return by_style
