"""Blocks of manifest rows to blocks of text vectors: tokenised where they arrive, the network on one thread of its own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch

from clipray.models.text_encoder import TextEncoder
from clipray.pipelines.block_encoder import start_encoder
from clipray.pipelines.decode_ahead import refusal_columns
from clipray.pipelines.messages import Report, fatal, worker_facts
from clipray.pipelines.spec import TextSettings
from clipray.tables import fits, vector_array
from clipray.tables.reasons import Rejected

AnyTexts = TypeVar("AnyTexts", bound=TextSettings)


@dataclass
class EncodedTexts:
    """Texts encoded: `vectors` (n, d) float32, `cut` (n,) bool, and the reasons of those that failed, by their place."""

    vectors: np.ndarray
    cut: np.ndarray
    failed: dict[int, Rejected] = field(default_factory=dict)


class TextWork(ABC, Generic[AnyTexts]):
    """Blocks with texts in, blocks out, in a worker.

    Several blocks may be under way at once: while one is being encoded, the next is being tokenised.
    """

    def __init__(self, settings: AnyTexts, report: Report) -> None:
        with fatal(report):
            self.settings, self.report = settings, report
            self._network, self._encoder = start_encoder(TextEncoder, settings)
            report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        """The table's columns for every row of a block, with `stage`, `reason`, `message` where one failed."""
        with fatal(self.report):
            start = time.perf_counter()
            made, refused = self._made(block)
            self.report({"stage": "encode", "rows": len(block), "seconds": time.perf_counter() - start})
            columns = {f.name: made[f.name] if f.name in made else _cast(block, f) for f in self.settings.schema}
            return pa.table({**columns, **refusal_columns(refused)})

    @abstractmethod
    def _made(self, block: pa.Table) -> tuple[dict[str, pa.Array], list[Rejected | None]]:
        """The columns that are made, and who is refused."""

    def _encode(self, texts: Sequence[str], places: Sequence[int]) -> EncodedTexts:
        """Encode the texts at `places`, the others' rows staying zero; one that fails is refused alone."""
        width = self.settings.model.embed_dim
        result = EncodedTexts(np.zeros((len(texts), width), np.float32), np.zeros(len(texts), bool))
        self._fill(texts, places, result)
        return result

    def _fill(self, texts: Sequence[str], places: Sequence[int], result: EncodedTexts) -> None:
        if not places:
            return
        try:
            tokens = self._encoder.tokenize([texts[n] for n in places])
            result.vectors[places] = self._network.submit(self._encoder.encode_tokens, tokens).result()
            result.cut[places] = tokens.cut
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(places) == 1:
                result.failed[places[0]] = Rejected("encode", "encode_failed", f"{type(error).__name__}: {error}")
                return
            for place in places:
                self._fill(texts, [place], result)
        for n in places:
            if not np.isfinite(result.vectors[n]).all():
                result.failed[n] = Rejected("encode", "encode_failed", "the vector is not finite")


class EncodeTexts(TextWork[TextSettings]):
    """Manifest rows -> rows of `texts`."""

    def _made(self, block: pa.Table) -> tuple[dict[str, pa.Array], list[Rejected | None]]:
        texts = block["text"].to_pylist()
        refused = [refusal(text, "text") for text in texts]
        found = self._encode(texts, [n for n, no in enumerate(refused) if no is None])
        kind = self.settings.schema.field("embedding").type
        for n in (n for n, x in enumerate(found.vectors) if n not in found.failed and not fits(x, kind)):
            found.failed[n] = Rejected("encode", "encode_failed", "the vector is too large for its column")
            found.vectors[n] = 0
        made = {"embedding": vector_array(found.vectors, kind), "truncated": pa.array(found.cut)}
        return made, [found.failed.get(n, no) for n, no in enumerate(refused)]


def refusal(text: str | None, column: str) -> Rejected | None:
    """Why a text cannot become a row, if it cannot."""
    if text is None:
        return Rejected("manifest", "no_source", f"no `{column}`")
    if not text.strip():
        return Rejected("manifest", "empty", f"the {column} is empty or nothing but space")
    return None


def _cast(block: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    return block[field.name].cast(field.type)
