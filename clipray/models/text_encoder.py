"""Encodes texts: open_clip's vectors at the hardware's best precision, checked against fp32."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import open_clip
import torch
from open_clip.transformer import TextTransformer, text_global_pool

from clipray.analysis.normalize import l2_normalize_tensor
from clipray.models.encoder import Encoder, EncoderOptions, Precision
from clipray.models.load import load
from clipray.models.resolve import ResolvedModel
from clipray.models.tokenizer import tokenizer_of

TEXTS_AT_ONCE = 8_192  # that are tokenised together, and sorted by length
STEP = 8  # lengths are rounded up to whole steps: a CPU chooses its kernels anew for every shape
SAME = 1e-5
SAMPLE_TEXTS = (
    "a dog",
    "a photo of a red bicycle in front of a brick wall",
    "Two people are sitting at a wooden table in a bright kitchen; one of them is reading a newspaper.",
    "An oil painting of a harbour at dusk, with many small boats, lanterns along the quay, a church tower and hills in the distance.",
)
"""The texts on which an encoder checks its precision."""


class TextTower(torch.nn.Module):
    """What `encode_text` runs, raw vectors, without the image tower (CoCa's own default is to normalise them).

    A text's vector is read at its end token, and a causal network sees nothing behind it. So texts of such a network
    may be cut after the longest one's end, which most texts reach long before the context is full.

    Attributes:
        cuts: whether `forward` takes tokens that are cut.
    """

    def __init__(self, network: Any, *, zero_padded: bool) -> None:
        super().__init__()
        for unused in ("visual", "text_decoder"):
            if hasattr(network, unused):
                delattr(network, unused)
        self.network = network
        self._parts = _causal_parts(network) if zero_padded else None
        self.cuts = self._parts is not None and self._proves_to_cut()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(b, length) int64 -> (b, d), where length is the context's or, if `cuts`, anything that holds all end tokens."""
        if not self.cuts:
            return self.network.encode_text(tokens, normalize=False)
        return self._cut(tokens)

    def _cut(self, tokens: torch.Tensor) -> torch.Tensor:
        """`encode_text` of open_clip's CLIP and of its TextTransformer, with as many positions as there are."""
        parts, length = self._parts, tokens.shape[1]
        assert parts is not None
        dtype = parts.transformer.get_cast_dtype()
        positions = parts.positional_embedding[:length].to(dtype)
        x = parts.token_embedding(tokens).to(dtype) + positions  # (b, length, width)
        x = parts.ln_final(parts.transformer(x, attn_mask=parts.attn_mask[:length, :length]))
        pool, eos = _pooling_of(parts)
        x = text_global_pool(x, tokens, pool, eos_token_id=eos)
        projection = parts.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection

    def _proves_to_cut(self) -> bool:
        """Whether tokens that are cut give the vectors of open_clip's own way."""
        parts, context = self._parts, int(self.network.context_length)
        assert parts is not None
        end = parts.token_embedding.num_embeddings - 1
        tokens = torch.zeros((2, context), dtype=torch.int64, device=parts.token_embedding.weight.device)
        lengths = (max(2, context // 3), max(2, context // 2))
        for row, length in enumerate(lengths):
            tokens[row, : length - 1] = torch.arange(1, length)
            tokens[row, length - 1] = parts.eos_id if _pooling_of(parts)[0] == "eos" else end
        whole, cut = self.network.encode_text(tokens, normalize=False), self._cut(tokens[:, : max(lengths)])
        return bool((whole - cut).abs().max() <= SAME * whole.abs().max().clamp(min=1))


def _causal_parts(network: Any) -> Any:
    """The module that holds the parts of a causal text tower of open_clip's own make; None for any other."""
    parts = network.text if isinstance(network, open_clip.CustomTextCLIP) else network
    known = isinstance(network, open_clip.CLIP) or isinstance(parts, TextTransformer)
    if not known or parts.attn_mask is None or getattr(parts, "cls_emb", None) is not None:
        return None
    if getattr(parts, "output_tokens", False) or _pooling_of(parts)[0] not in ("argmax", "eos"):
        return None
    return parts


def _pooling_of(parts: Any) -> tuple[str, int | None]:
    if isinstance(parts, TextTransformer):
        return parts.pool_type, parts.eos_id
    return parts.text_pool_type, parts.text_eos_id


@dataclass(frozen=True)
class Tokens:
    """Texts as open_clip's tokens: `ids` (n, context_length) int64; `cut` (n,) bool, which of them were too long."""

    ids: torch.Tensor
    cut: np.ndarray

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.cut[rows])


class TextEncoder(Encoder[TextTower]):
    """The text tower of a model as an `Encoder`, whose arguments and attributes it has.

    Attributes:
        context_length: tokens that the network reads of a text, start and end tokens included.
        logit_scale: factor of cosines before the softmax (the exponential is taken). logit_bias: what SigLIP adds.

    Raises:
        ModelError: the model has no text tower, or its tokenizer does not load.
    """

    sample = "test texts"
    gpu_sizes = (64, 128, 256, 512, 1024)

    def __init__(self, model: ResolvedModel, **options: Unpack[EncoderOptions]) -> None:
        self._tokenizer, self._tokenizing = tokenizer_of(model), threading.Lock()  # some of them change while they work
        self.context_length = self._tokenizer.context_length
        super().__init__(model, **options)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode n texts. Those of more than `context_length` tokens are cut, as open_clip does.

        Returns:
            ((n, d) float32 vectors, (n,) bool: cut)
        """
        vectors, cut = [np.zeros((0, self.model.embed_dim), np.float32)], [np.zeros(0, bool)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = self.tokenize(texts[start : start + TEXTS_AT_ONCE])
            vectors.append(self.encode_tokens(tokens))
            cut.append(tokens.cut)
        return np.concatenate(vectors), np.concatenate(cut)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """What `encode_tokens` takes; may run in another thread."""
        with self._tokenizing:
            tokens, cut = self._tokenizer(texts)
        return Tokens(tokens, cut.numpy())

    def token_count(self, text: str) -> int:
        """Tokens of a text, start and end tokens included, before anything is cut."""
        return self._tokenizer.counts([text])[0]

    @torch.inference_mode()
    def encode_tokens(self, texts: Tokens) -> np.ndarray:
        """(n, d) float32 vectors, in the order of the texts; those of like length go through the network together."""
        tokens = texts.ids
        lengths = _lengths(tokens) if self.network.cuts else torch.full((len(tokens),), self.context_length)
        order = torch.argsort(lengths, stable=True)
        tokens, lengths = tokens[order], lengths[order]

        def forward(rows: slice) -> np.ndarray:
            length = min(self.context_length, -int(-lengths[rows].max() // STEP) * STEP)
            x = self.network(tokens[rows, :length].to(self.device, non_blocking=True)).float()
            return (l2_normalize_tensor(x) if self._normalize else x).cpu().numpy()

        ordered = np.concatenate(self._in_batches(len(tokens), forward))
        vectors = np.empty_like(ordered)
        vectors[order.numpy()] = ordered
        return vectors

    def _load(self) -> TextTower:
        network: Any = load(self.model, self.device)
        self.logit_scale = float(network.logit_scale.exp())
        bias = getattr(network, "logit_bias", None)
        self.logit_bias = None if bias is None else float(bias)
        return TextTower(network, zero_padded=self._tokenizer.zero_padded)

    def _sample_vectors(self, network: TextTower, _precision: Precision) -> dict[str, torch.Tensor]:
        tokens, _ = self._tokenizer(SAMPLE_TEXTS)
        return {"text": network(tokens.to(self.device)).float()}

    def _encode_sample(self, size: int) -> object:
        return self.encode([SAMPLE_TEXTS[1]] * size)


def _lengths(tokens: torch.Tensor) -> torch.Tensor:
    """(n,) tokens up to the last one that is no padding, of rows padded with zeros."""
    places = torch.arange(1, tokens.shape[1] + 1)
    return (places * (tokens != 0)).amax(dim=1)
