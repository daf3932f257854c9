"""Blocks of pictures with labels to blocks of attacks: each picture twice, as it is and with a wrong label written on it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from clipray.analysis.zero_shot import ZeroShot
from clipray.models.image_encoder import ImageEncoder
from clipray.pipelines.block_encoder import start_encoder
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.decode_ahead import PictureLoader, refusal_columns
from clipray.pipelines.messages import Report, fatal, worker_facts
from clipray.pipelines.spec import AttackSettings
from clipray.pipelines.typography import place_of, write_word, wrong_label
from clipray.tables.reasons import Rejected


class AttackBlocks:
    """Manifest rows -> rows of `attacks`, with `stage`, `reason`, `message` where one failed.

    Pictures are decoded once and preprocessed twice, in threads; the network runs in others.
    """

    def __init__(self, settings: AttackSettings, report: Report) -> None:
        with fatal(report):
            self.settings, self.report = settings, report
            self._networks, self._encoder = start_encoder(ImageEncoder, settings)
            known = settings.classes()
            self._classifier = ZeroShot(known.vectors, known.logit_scale, top=1, precision="fp32")
            self._number = {label: n for n, label in enumerate(settings.labels)}
            self._loader = PictureLoader(settings)
            report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._attack(block)

    def _attack(self, block: pa.Table) -> pa.Table:
        labels = block["label"].to_pylist()
        words = [
            None if label is None else self._word(image_id, label)
            for image_id, label in zip(block["image_id"].to_pylist(), labels, strict=True)
        ]
        size = max(1, self._encoder.batch_size // 2)
        pictures = self._loader.load(block, 2 * size, map(self._loader.both, self._changes(block, words)))
        work = zip(labels, pictures, strict=True)
        waiting = []
        while chunk := list(itertools.islice(work, size)):
            waiting.append(self._networks.submit(self._label, chunk))
        rows = [row for future in waiting for row in future.result()]
        return self._table(block, words, rows)

    def _word(self, image_id: str, label: str) -> str:
        if self.settings.own:
            return label
        number = wrong_label(image_id, self._number[label], len(self.settings.labels), self.settings.seed)
        return self.settings.labels[number]

    def _changes(self, block: pa.Table, words: list[str | None]) -> list[Callable[[Image.Image], Image.Image]]:
        lettering, seed = self.settings.lettering, self.settings.seed
        return [
            partial(write_word, word=word or "", place=place_of(image_id, lettering, seed), lettering=lettering)
            for image_id, word in zip(block["image_id"].to_pylist(), words, strict=True)
        ]

    def _label(self, chunk: list[tuple[str | None, DecodedImage | Rejected]]) -> list[dict[str, Any] | Rejected]:
        """For each picture its size, and its label before and after; or why there are none."""
        start = time.perf_counter()
        good = [p for label, p in chunk if isinstance(p, DecodedImage) and label is not None]
        found = iter(self._try(good))
        self.report({"stage": "encode", "rows": len(chunk), "seconds": time.perf_counter() - start})
        no_label = Rejected("manifest", "no_label", "no `label`")
        return [no_label if label is None else p if isinstance(p, Rejected) else next(found) for label, p in chunk]

    def _try(self, pictures: list[DecodedImage]) -> list[dict[str, Any] | Rejected]:
        if not pictures:
            return []
        try:
            return self._rows(pictures)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(pictures) > 1:
                return [row for picture in pictures for row in self._try([picture])]
            return [Rejected("encode", "encode_failed", f"{type(error).__name__}: {error}")]

    def _rows(self, pictures: list[DecodedImage]) -> list[dict[str, Any] | Rejected]:
        pixels = np.concatenate([picture.pixels for picture in pictures])  # (2 n, H, W, 3): before, after, before, …
        vectors = self._encoder.encode(pixels).vectors["clip"]
        top = self._classifier.label(vectors)
        rows: list[dict[str, Any] | Rejected] = []
        for n, picture in enumerate(pictures):
            if not np.isfinite(vectors[2 * n : 2 * n + 2]).all():
                rows.append(Rejected("encode", "encode_failed", "the vector is not finite"))
                continue
            row: dict[str, Any] = {"height": picture.height, "width": picture.width}
            for name, at in (("before", 2 * n), ("after", 2 * n + 1)):
                row[name] = self.settings.labels[int(top.classes[at, 0])]
                row[f"{name}_probability"] = float(top.probabilities[at, 0])
            rows.append(row)
        return rows

    def _table(self, block: pa.Table, words: list[str | None], rows: list[dict[str, Any] | Rejected]) -> pa.Table:
        columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        for field in self.settings.schema:
            if field.name == "word":
                columns["word"] = pa.array(words, pa.string())
            elif field.name in block.column_names:
                columns[field.name] = block[field.name].cast(field.type)
            else:  # `uri` of a manifest of bytes is in no row
                columns[field.name] = pa.array(
                    [row.get(field.name) if isinstance(row, dict) else None for row in rows], field.type
                )
        return pa.table({**columns, **refusal_columns(rows)})
