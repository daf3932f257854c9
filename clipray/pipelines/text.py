"""Texts to vectors. Tokenised in the calling thread, encoded in one of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import pyarrow as pa
import torch

from clipray.models.text_encoder import TextEncoder, Tokens
from clipray.pipelines.block_encoder import BlockEncoder, Row, encode_or_reject
from clipray.pipelines.spec import EncoderSpec, Report, TextSpec
from clipray.tables.reasons import Rejected

SpecT = TypeVar("SpecT", bound=EncoderSpec)
Item = TypeVar("Item")


class TokenBlockEncoder(BlockEncoder[SpecT, TextEncoder, Item]):
    """What texts and captions share: whole blocks are encoded at once, because texts of like length go together."""

    def __init__(self, spec: SpecT, report: Report) -> None:
        super().__init__(spec, report, TextEncoder)

    @property
    def chunk_rows(self) -> int:
        return sys.maxsize

    def tokenize(self, rows: Sequence[Sequence[str] | Rejected]) -> list[Tokens | Rejected]:
        """The tokens of each row's texts; a row whose texts cannot be tokenised is rejected alone."""
        return encode_or_reject(self._tokenize, rows)

    def _tokenize(self, rows: Sequence[Sequence[str]]) -> list[Tokens]:
        tokens = self.encoder.tokenize([text for texts in rows for text in texts])
        ends = np.cumsum([len(texts) for texts in rows]).tolist()
        return [tokens[end - len(texts) : end] for texts, end in zip(rows, ends, strict=True)]

    def vectors(self, rows: Sequence[Tokens]) -> list[np.ndarray]:
        """For each row's k texts (k, d) float32."""
        ids, cut = torch.cat([tokens.ids for tokens in rows]), np.concatenate([tokens.cut for tokens in rows])
        starts = np.cumsum([len(tokens.cut) for tokens in rows])[:-1]
        return np.split(self.encoder.encode_tokens(Tokens(ids, cut)), starts)


class TextBlockEncoder(TokenBlockEncoder[TextSpec, Tokens]):
    """Manifest rows -> rows of `texts`."""

    def load(self, block: pa.Table) -> Iterator[Tokens | Rejected]:
        texts = block["text"].to_pylist()
        return iter(self.tokenize([rejection(text, "text") or [text] for text in texts]))

    def encode(self, items: Sequence[Tokens]) -> list[Row]:
        vectors = self.vectors(items)
        return [
            Row({"embedding": x[0], "truncated": bool(tokens.cut[0])}) for tokens, x in zip(items, vectors, strict=True)
        ]


def rejection(text: str | None, column: str) -> Rejected | None:
    """Why a text cannot become a row, if it cannot."""
    if text is None:
        return Rejected("manifest", "no_source", f"no `{column}`")
    if not text.strip():
        return Rejected("manifest", "empty", f"the {column} is empty or nothing but space")
    return None
