"""Transformers whose weights lie as oneDNN multiplies them: on a CPU, bf16 takes a fifth less time.

A plain linear layer has its weights brought into that layout at every call. The operators are the ones that torch's
compiler uses for frozen weights; they are no public interface, and a torch without them keeps its plain layers. Linear
layers give the same bits as plain ones; the patches' may differ in the last.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

# of open_clip and timm; in other modules a parent may read its layer's weights itself
_BLOCKS = (ResidualAttentionBlock, Block)
_EMBEDDINGS = (VisionTransformer, PatchEmbed)


def packs() -> bool:
    """Whether this torch has the operators, and this CPU what they need for bf16."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    present = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return present and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weights(network: nn.Module) -> None:
    """Pack the bf16 weights of a network's vision transformers and transformer blocks, in place, to encode on a CPU."""
    if not packs():
        return
    # CoCa's decoder has blocks that attend to another sequence, with a norm for it.
    blocks = [m for m in network.modules() if type(m) in _BLOCKS and not hasattr(m, "ln_1_kv")]
    for parent in [m for m in network.modules() if type(m) in _EMBEDDINGS]:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Conv2d and layer.kernel_size == layer.stride and layer.padding == (0, 0):
                setattr(parent, name, PackedPatches(layer))
    for parent in [module for block in blocks for module in block.modules()]:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, PackedLinear(layer.weight, layer.bias))
            elif type(layer) is nn.MultiheadAttention and layer.batch_first and layer.in_proj_weight is not None:
                setattr(parent, name, PackedAttention(layer))


class PackedLinear(nn.Module):
    """A linear layer; `weight` (out, in) bf16 is opaque, its `to_dense()` is the plain one."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out), bf16."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


class PackedAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself, batch first; its attributes as that one's, weights packed.

    Attributes:
        in_proj: the layer that makes queries, keys and values, (…, embed_dim) -> (…, 3 · embed_dim).
    """

    def __init__(self, plain: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = plain.embed_dim, plain.num_heads, plain.head_dim
        self.in_proj = PackedLinear(plain.in_proj_weight, plain.in_proj_bias)
        self.in_proj_weight, self.in_proj_bias = self.in_proj.weight, self.in_proj.bias
        self.out_proj = PackedLinear(plain.out_proj.weight, plain.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(n, l, embed_dim) -> the same, without weights; `key` and `value` are `query`. attn_mask: (l, l), (n · heads, l, l).

        Raises:
            ValueError: another key or value, a `key_padding_mask` or `need_weights`, which plain attention can do.
        """
        if key is not query or value is not query:
            raise ValueError(
                "expected query, key and value to be one tensor; packed attention is of a sequence with itself"
            )
        if key_padding_mask is not None:
            raise ValueError("expected no key_padding_mask; packed attention takes `attn_mask` alone")
        if need_weights:
            raise ValueError("expected need_weights=False; packed attention returns no weights")
        n, length, width = query.shape
        parted = self.in_proj(query).view(n, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if attn_mask is None:
            attended = attend(*parted.contiguous().unbind(0))  # (n, heads, l, d) each
        else:
            q, k, v = parted.unbind(0)
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (n, self.num_heads))
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(attended.transpose(1, 2).reshape(n, length, width)), None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of (…, n, d) and (…, m, d). On a CPU two products beat the fused kernel, at 197 tokens by half."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return ((q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)).softmax(-1) @ v
    return nn.functional.scaled_dot_product_attention(q, k, v)


class PackedPatches(nn.Module):
    """The convolution that embeds patches side by side: a linear layer of each patch."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self._size = plain.kernel_size
        self._linear = PackedLinear(plain.weight.permute(0, 2, 3, 1).flatten(1).contiguous(), plain.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, H, W) -> (n, out, rows, columns); what is left of a patch at the right and below is not looked at."""
        tall, wide = self._size
        rows, columns = x.shape[-2] // tall, x.shape[-1] // wide
        pixels = x[..., : rows * tall, : columns * wide].permute(0, 2, 3, 1)
        patches = pixels.unflatten(2, (columns, wide)).unflatten(1, (rows, tall)).transpose(2, 3)
        return self._linear(patches.flatten(3, 5)).permute(0, 3, 1, 2)
