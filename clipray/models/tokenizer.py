"""A model's own tokenizer, and what open_clip does not report: how many tokens a text has before it is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, basic_clean, canonicalize_text

from clipray.errors import ModelError, one_line
from clipray.models.hf_models import HuggingFaceTokenizer
from clipray.models.resolve import ResolvedModel
from clipray.models.weights import quiet

Made = TypeVar("Made")


def tokenizer_of(model: ResolvedModel) -> Tokenizer | HuggingFaceTokenizer:
    """The tokenizer that goes with a model.

    Raises:
        ModelError: the model has no text tower, or its tokenizer needs a library or files that are not there.
    """
    if not model.has_text:
        raise ModelError(f"{model.name} is a vision model, without a text tower: it encodes no texts")
    if model.library == "transformers":
        return _told(model, lambda: HuggingFaceTokenizer(model.name))
    return Tokenizer(model)


def _told(model: ResolvedModel, make: Callable[[], Made]) -> Made:
    """What `make` returns. Raises ModelError: it cannot."""
    try:
        with quiet():
            return make()
    except Exception as error:  # open_clip, the hub and transformers raise many kinds
        reason = one_line(error)
        hint = "; `pip install clipray[hf]`" if isinstance(error, ImportError) else ""
        raise ModelError(f"{model.name}: its tokenizer could not be loaded: {reason}{hint}") from error


class Tokenizer:
    """The tokenizer that open_clip pairs with a model.

    Attributes:
        context_length: tokens that the network reads of a text, start and end tokens included.
        zero_padded: whether what follows a text's end token is zeros, as in CLIP's own tokenizer.

    Raises:
        ModelError: it needs a library or files that are not there.
    """

    def __init__(self, model: ResolvedModel) -> None:
        if model.config:
            open_clip.add_model_config(model.config)
        self._tokenizer: Any = _told(model, lambda: open_clip.get_tokenizer(model.name))
        self.context_length = int(self._tokenizer.context_length)
        self.zero_padded = isinstance(self._tokenizer, SimpleTokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """open_clip's own tokens of n texts, and which of them were cut.

        Returns:
            ((n, context_length) int64, (n,) bool)
        """
        if not self.zero_padded:
            tokens = self._tokenizer(list(texts))
            return tokens, torch.tensor([count > self.context_length for count in self.counts(texts)], dtype=torch.bool)
        # With room for one token more, only a text that is too long reaches the last place.
        wide = self._tokenizer(list(texts), self.context_length + 1)
        cut = wide[:, -1] != 0
        tokens = wide[:, :-1].clone()
        if cut.any():
            tokens[cut] = self._tokenizer([texts[n] for n in cut.nonzero().flatten().tolist()])
        return tokens, cut

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, start and end tokens included, before anything is cut."""
        inner = self._tokenizer
        if isinstance(inner, SimpleTokenizer):
            return [len(inner.encode(text)) + 2 for text in texts]
        if not isinstance(inner, HFTokenizer):  # SigLIP's
            clean = [canonicalize_text(basic_clean(text)) for text in texts]
            return [len(ids) for ids in inner.tokenizer(clean, truncation=False).input_ids]
        clean = [inner.clean_fn(text) for text in texts]
        plain = inner.tokenizer_mode == "clips"  # open_clip adds start, end and class tokens itself
        token_ids = inner.tokenizer(clean, add_special_tokens=not plain, truncation=False).input_ids
        return [len(ids) + (3 if plain else 0) for ids in token_ids]
