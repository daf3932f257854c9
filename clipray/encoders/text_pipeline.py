"""Blocks of manifest rows to blocks of text vectors: tokenised where they arrive, the network on one thread of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch

from clipray.encoders.decoding import refusal_columns
from clipray.encoders.encode_settings import TextSettings
from clipray.encoders.images import Refused
from clipray.encoders.text_encoder import TextEncoder
from clipray.reports import Report, fatal, worker_facts
from clipray.tables import vector_array


class EncodeTexts:
    """Manifest rows -> rows of the table, with `stage`, `reason`, `message` where one failed.

    Several blocks may be under way at once: while one is being encoded, the next is being tokenised.
    """

    def __init__(self, settings: TextSettings, report: Report) -> None:
        with fatal(report):
            self.settings, self.report = settings, report
            torch.set_num_threads(settings.threads)
            self._encoder = TextEncoder(
                settings.model,
                precision=settings.precision,
                device=settings.device,
                batch_size=settings.batch_size,
                normalize=settings.normalize,
            )
            self._gpu = ThreadPoolExecutor(1, "encode", initializer=torch.set_num_threads, initargs=(settings.threads,))
            report(worker_facts(self._encoder.facts, settings.threads))

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            start = time.perf_counter()
            result = self._encode_block(block)
            self.report({"stage": "encode", "rows": len(block), "seconds": time.perf_counter() - start})
            return result

    def _encode_block(self, block: pa.Table) -> pa.Table:
        texts = block["text"].to_pylist()
        refused = [refusal(text) for text in texts]
        good = [n for n, no in enumerate(refused) if no is None]
        vectors = np.zeros((len(texts), self.settings.model.embed_dim), np.float32)
        cut = np.zeros(len(texts), bool)
        failed = self._fill(texts, good, vectors, cut)
        refused = [failed.get(n, no) for n, no in enumerate(refused)]
        kind = self.settings.schema.field("embedding").type
        made = {"embedding": vector_array(vectors, kind), "truncated": pa.array(cut)}
        columns = {f.name: made.get(f.name, _cast(block, f)) for f in self.settings.schema}
        return pa.table({**columns, **refusal_columns(refused)})

    def _fill(
        self, texts: Sequence[str], places: Sequence[int], vectors: np.ndarray, cut: np.ndarray
    ) -> dict[int, Refused]:
        """Encode the texts at `places` into the rows of `vectors` and `cut`; one that fails is refused alone."""
        if not places:
            return {}
        try:
            tokens = self._encoder.tokenize([texts[n] for n in places])
            vectors[places] = self._gpu.submit(self._encoder.encode_tokens, tokens).result()
            cut[places] = tokens.cut
        except (RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):  # at a batch of one: no row's fault
                raise
            if len(places) > 1:
                return {n: no for place in places for n, no in self._fill(texts, [place], vectors, cut).items()}
            return {places[0]: Refused("encode", "encode_failed", f"{type(error).__name__}: {error}")}
        wrong = [n for n in places if not np.isfinite(vectors[n]).all()]
        return {n: Refused("encode", "encode_failed", "the vector is not finite") for n in wrong}


def refusal(text: str | None) -> Refused | None:
    """Why a text cannot become a row, if it cannot."""
    if text is None:
        return Refused("manifest", "no_source", "no `text`")
    if not text.strip():
        return Refused("manifest", "empty", "the text is empty or nothing but space")
    return None


def _cast(block: pa.Table, field: pa.Field) -> pa.Array | None:
    return block[field.name].cast(field.type) if field.name in block.column_names else None
