"""A CLIP with a token table of only the tokens that occur, for training; saved as an ordinary open_clip checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.transformer import text_global_pool
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tools.demo_model.measure import read_config

TOKEN_TABLE = "token_embedding.weight"


class CompactClip(nn.Module):
    """open_clip's CLIP over a shortened vocabulary, in bf16 (a ViT) or float32. Encodes uint8 pixels and strings."""

    used_tokens: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, config: dict[str, Any], texts: list[str]) -> None:
        super().__init__()
        context_length = config["text_cfg"]["context_length"]
        self.tokenize = open_clip.SimpleTokenizer(context_length=context_length)
        tokens = torch.cat([self.tokenize(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
        # sorted, so that the end-of-text token keeps the highest number, by which open_clip finds it
        used = torch.unique(torch.cat([tokens.flatten(), torch.zeros(1, dtype=torch.long)]))
        self.register_buffer("used_tokens", used)
        self.full_vocab_size = config["text_cfg"]["vocab_size"]
        self.short_of = dict(zip(texts, torch.searchsorted(used, tokens), strict=True))
        config = copy.deepcopy(config)
        config["text_cfg"]["vocab_size"] = len(used)
        is_vit = isinstance(config["vision_cfg"]["layers"], int)  # batch norm of a ResNet wants float32
        self.dtype = torch.bfloat16 if is_vit else torch.float32
        layout = torch.preserve_format if is_vit else torch.channels_last
        self.clip = CLIP(**config).to(self.dtype, memory_format=layout)
        self.register_buffer("mean", torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1) * 255)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [batch, 3, height, width] → unit vectors float32 [batch, embed_dim]."""
        images = ((pixels - self.mean) / self.std).to(self.dtype)
        return F.normalize(self.clip.encode_image(images).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """Strings known at construction → unit vectors float32 [n, embed_dim]; padding is cut to the longest text."""
        clip, tokens = self.clip, torch.stack([self.short_of[text] for text in texts])
        length = int(tokens.argmax(dim=1).max()) + 1
        tokens = tokens[:, :length]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length].to(self.dtype)))
        return F.normalize((text_global_pool(x, tokens, "argmax") @ clip.text_projection).float(), dim=-1)


def build_compact(config: Path, texts: Iterable[str]) -> CompactClip:
    """A new model that knows these texts."""
    return CompactClip(read_config(config), sorted(set(texts)))


def save_full(model: CompactClip, live: list[torch.Tensor], master: list[torch.Tensor], path: Path) -> None:
    """Save the float32 masters as fp16 under open_clip's names, with the whole token table (unused rows are zero)."""
    value_of = {id(p): m for p, m in zip(live, master, strict=True)}
    state = dict(model.clip.state_dict())
    for name, parameter in model.clip.named_parameters():
        state[name] = value_of[id(parameter)].detach()
    state.pop("attn_mask", None)
    table = torch.zeros(model.full_vocab_size, state[TOKEN_TABLE].shape[1])
    table[model.used_tokens] = state[TOKEN_TABLE].float()
    state[TOKEN_TABLE] = table
    halves = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in state.items()}
    aside = path.with_suffix(".tmp")
    save_file(halves, aside, metadata={"format": "pt"})
    aside.chmod(0o644)  # safetensors writes for the owner alone
    aside.replace(path)
