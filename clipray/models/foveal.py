"""Foveal attention: a CLIP vision transformer turned to regions of an image, whose pixels stay as they are.

FALIP (Zhuang et al. 2024, arXiv 2407.05578): in chosen blocks a mask is added to the attention logits before the softmax.
Only the class token's row of it is not zero; there it holds, for every patch, a Gaussian bump over the region, min-max
normalised and scaled by `alpha`. The class token's own column is 0. Where the bump lies, and how wide it is: `bumps`, and
`falip_bumps` as the authors' code has it.

Because patches are not masked, what lies before the first masked block is the same for all regions of an image, and so
are the patches behind that block: they saw the class token as it was before. So regions share the patch embedding, all
blocks up to and including the first masked one, and in the last block nothing but the class token's row is computed.
With masks in the last two blocks a region costs two rows; each block more costs a block for each region.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from clipray.analysis.normalize import l2_normalize_tensor
from clipray.errors import ModelError
from clipray.job import VECTOR, Foveal
from clipray.models.features import Features
from clipray.models.layers import TIMM, visual_of
from clipray.models.packed import PackedAttention, attend

FALIP_DEPTH = 12  # blocks of the ViT in which FALIP's are chosen
MIN_SIGMA = 0.5  # in patches: a narrower bump falls between their centres
FALIP_EPSILON = 1e-6  # of its min-max normalisation, so that patches of equal height are 1
MIDDLE = (0.25, 0.25, 0.75, 0.75)  # the region on which an encoder checks its precision, as a share of the image
LEAST_AT_ONCE = 16  # regions that go through the later blocks together, in a batch of fewer images


def refusal(tower: torch.nn.Module) -> str | None:
    """Why an image tower's attention cannot be turned to a region; None where it can."""
    visual: Any = visual_of(tower)[1]
    if isinstance(visual, ModifiedResNet):
        return "it is a ResNet: there is no class token whose attention could be steered"
    if isinstance(visual, TIMM):
        return f"it is timm's {type(visual.trunk).__name__}: only open_clip's own vision transformers are steered"
    if not isinstance(visual, VisionTransformer):
        return "it is none of open_clip's own vision transformers"
    if visual.attn_pool is not None:
        return "it pools its patches by attention: its vector is not that of the class token"
    if visual.pool_type != "tok":
        return f"it pools its patches ({visual.pool_type!r}): its vector is not that of the class token"
    others = {
        type(block).__name__ for block in visual.transformer.resblocks if type(block) is not ResidualAttentionBlock
    }
    return f"its blocks are of another make ({others.pop()})" if others else None


def check(tower: torch.nn.Module, foveal: Foveal) -> None:
    """Raises ModelError: a tower that cannot be steered, or blocks or heads that it does not have."""
    if reason := refusal(tower):
        raise ModelError(f"prompt: foveal: {reason}; take a ViT with a class token, or `prompt: crop`")
    blocks = visual_of(tower)[1].transformer.resblocks
    if foveal.mask == "falip" and "blocks" not in foveal.model_fields_set and len(blocks) != FALIP_DEPTH:
        raise ModelError(
            f"foveal: mask: falip: its blocks are 8 to 11 of {FALIP_DEPTH}, this ViT has {len(blocks)}; "
            f"set `blocks`, such as `blocks: {max(1, len(blocks) // 3)}`, its last third"
        )
    asked = foveal.blocks if isinstance(foveal.blocks, list) else [foveal.blocks - 1] if foveal.blocks != "all" else []
    heads = foveal.heads if isinstance(foveal.heads, list) else []
    for name, count, wanted in (("blocks", len(blocks), asked), ("heads", blocks[0].attn.num_heads, heads)):
        if wanted and max(wanted) >= count:
            numbers = getattr(foveal, name)
            raise ModelError(f"foveal: {name}: this ViT has {count} {name}, numbered from 0; found {numbers}")


def chosen_blocks(blocks: str | int | Sequence[int], depth: int) -> list[int]:
    """Numbers of the masked blocks of a transformer of `depth` blocks, ascending."""
    if isinstance(blocks, int):
        return list(range(depth - blocks, depth))
    return list(range(depth)) if isinstance(blocks, str) else sorted(blocks)


class FovealTower(torch.nn.Module):
    """An image tower that gives a vector for each region of its images.

    Args:
        tower: what `image_tower` returns.

    Raises:
        ModelError: the tower cannot be steered.
    """

    def __init__(self, tower: torch.nn.Module, foveal: Foveal) -> None:
        super().__init__()
        check(tower, foveal)
        self.tower, self.foveal = tower, foveal
        self._visual: Any = visual_of(tower)[1]
        self.blocks = chosen_blocks(foveal.blocks, len(self._visual.transformer.resblocks))

    def forward(self, batch: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
        """Vectors of regions, (K, d) in the tower's dtype.

        Args:
            batch: (b, 3, height, width), normalised, in the tower's dtype.
            boxes: (K, 4) float32 x1, y1, x2, y2 in px of `batch`. owner: (K,) int64, each box's image in `batch`.
        """
        if self.foveal.alpha == 0:
            plain = self.tower(batch)
            return (plain[0] if isinstance(plain, tuple) else plain)[owner]
        return self.steered(batch, boxes, owner)

    def steered(self, batch: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
        """As `forward`, whatever `alpha`."""
        visual = self._visual
        x = _embedded(visual, batch)  # (b, n, d): class token, patches
        for block in visual.transformer.resblocks[: self.blocks[0]]:
            x = block(x)
        shared = _Shared(self._visual.transformer.resblocks[self.blocks[0] :], x)
        masks = self._masks(boxes, batch.shape).to(x.dtype)
        at_once = max(len(batch), LEAST_AT_ONCE)
        rows = [
            self._class_tokens(shared, masks[start : start + at_once], owner[start : start + at_once])
            for start in range(0, len(boxes), at_once)
        ]
        vectors = visual.ln_post(torch.cat([x[:0, 0], *rows]))  # (K, width)
        return vectors if visual.proj is None else vectors @ visual.proj

    def _masks(self, boxes: Tensor, input_shape: torch.Size) -> Tensor:
        """(K, heads or 1, 1, n): what is added to the class token's logits."""
        patch = self._visual.patch_size
        height, width = input_shape[-2] // patch[0], input_shape[-1] // patch[1]
        cells = boxes / boxes.new_tensor([patch[1], patch[0]] * 2)
        drawn = falip_bumps if self.foveal.mask == "falip" else bumps
        bump = self.foveal.alpha * drawn(cells, height, width, self.foveal.sigma).flatten(1)  # (K, n - 1)
        row = torch.nn.functional.pad(bump, (1, 0))[:, None, None]
        if self.foveal.heads == "all":
            return row
        there = self._visual.transformer.resblocks[0].attn.num_heads
        return row * row.new_tensor([float(h in self.foveal.heads) for h in range(there)])[:, None, None]

    def _class_tokens(self, shared: _Shared, masks: Tensor, owner: Tensor) -> Tensor:
        """(k, d): the class tokens behind the last block."""
        blocks, first = self._visual.transformer.resblocks, self.blocks[0]
        x: Tensor | None = None  # (k, n, d), from the third block on
        for number in range(first, len(blocks)):
            mask = masks if number in self.blocks else None
            if number == first:
                token = shared.first_row(owner, mask)
            elif number == len(blocks) - 1:
                token = shared.last_row(token, x, owner, mask)
            else:
                x = torch.cat([token, shared.patches[owner] if x is None else x[:, 1:]], dim=1)
                x = _block(blocks[number], x, mask)
                token = x[:, :1]
        return token[:, 0]


class FovealNetwork(torch.nn.Module):
    """A `FovealTower` as an encoder's network: normalised vectors of boxes, or, without any, of the image's middle."""

    def __init__(self, tower: torch.nn.Module, foveal: Foveal, normalize: bool) -> None:
        super().__init__()
        self.foveal, self._normalize = FovealTower(tower, foveal), normalize

    def forward(self, batch: Tensor, boxes: Tensor | None = None, owner: Tensor | None = None) -> Features[Tensor]:
        """As `FeatureNetwork.forward`; the vectors are float32."""
        if boxes is not None and owner is not None:
            return Features({}, boxes=self._finished(self.foveal(batch, boxes, owner)))
        sides = torch.tensor([*batch.shape[:1:-1]] * 2, device=batch.device)  # width, height, width, height
        middle = torch.tensor(MIDDLE, device=batch.device) * sides
        vectors = self.foveal(batch, middle.expand(len(batch), 4), torch.arange(len(batch), device=batch.device))
        return Features({VECTOR: self._finished(vectors)})

    def _finished(self, vectors: Tensor) -> Tensor:
        return l2_normalize_tensor(vectors.float()) if self._normalize else vectors.float()


class _Shared:
    """What the regions of an image share: its patches around the first masked block. blocks: from that one on."""

    def __init__(self, blocks: Any, x: Tensor) -> None:
        self._blocks, self._x = blocks, x
        self._last: tuple[Tensor, Tensor] | None = None
        if len(blocks) == 1:
            self._q, (_, self._k, self._v) = _heads(blocks[0], x[:, :1])[0], _heads(blocks[0], x, queries=False)
        else:
            q, self._k, self._v = _heads(blocks[0], x)
            self._q = q[:, :, :1]
            self.patches = _finished(blocks[0], x[:, 1:], attend(q[:, :, 1:], self._k, self._v))
        if len(blocks) == 2:
            self._last = _heads(blocks[1], self.patches, queries=False)[1:]

    def first_row(self, owner: Tensor, mask: Tensor | None) -> Tensor:
        """(k, 1, d): class tokens behind the first masked block."""
        row = scaled_dot_product_attention(self._q[owner], self._k[owner], self._v[owner], attn_mask=mask)
        return _finished(self._blocks[0], self._x[owner, :1], row)

    def last_row(self, token: Tensor, x: Tensor | None, owner: Tensor, mask: Tensor | None) -> Tensor:
        """(k, 1, d): class tokens behind the last block. x: (k, n, d) of regions whose patches differ, else None."""
        block = self._blocks[-1]
        q, k, v = _heads(block, token)
        if x is not None:
            patches = _heads(block, x[:, 1:], queries=False)[1:]
        else:
            assert self._last is not None
            patches = self._last[0][owner], self._last[1][owner]
        k, v = torch.cat([k, patches[0]], dim=2), torch.cat([v, patches[1]], dim=2)
        return _finished(block, token, scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _block(block: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """A whole block on (k, n, d), the mask in the class token's row."""
    q, k, v = _heads(block, x)
    rows = [scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=mask), attend(q[:, :, 1:], k, v)]
    return _finished(block, x, torch.cat(rows, dim=2))


def _embedded(visual: Any, batch: Tensor) -> Tensor:
    """What the first block of an open_clip ViT receives: tokens (b, n, d), the class token before the patches."""
    patches = visual.conv1(batch).flatten(2).transpose(1, 2)  # (b, n - 1, d)
    class_token = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    tokens = torch.cat([class_token, patches], dim=1) + visual.positional_embedding.to(patches.dtype)
    embedded: Tensor = visual.ln_pre(tokens)
    return embedded


def _heads(block: Any, x: Tensor, *, queries: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (b, heads, n, d / heads) of tokens (b, n, d); the queries are the keys where unwanted."""
    attn, start = block.attn, 0 if queries else block.attn.embed_dim
    if queries and isinstance(attn, PackedAttention):
        projected = attn.in_proj(block.ln_1(x))
    else:
        bias = None if attn.in_proj_bias is None else attn.in_proj_bias[start:]
        projected = linear(block.ln_1(x), attn.in_proj_weight.to_dense()[start:], bias)
    parts = projected.unflatten(-1, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return parts[0], parts[-2], parts[-1]


def _finished(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a block: tokens (k, n, d) and what their heads attended to (k, heads, n, d / heads) -> (k, n, d)."""
    x = x + block.ls_1(block.attn.out_proj(attended.transpose(1, 2).flatten(2)))
    after: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return after


def bumps(boxes: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Gaussian bumps over regions, min-max normalised: 1 at the patch nearest to the centre, 0 at the farthest.

    Args:
        boxes: (K, 4) x1, y1, x2, y2 in patches. height, width: of the grid of patches.
        sigma: standard deviation, as a share of half the box's sides; at least half a patch.

    Returns:
        (K, height, width) float32 in 0 … 1.
    """
    boxes = boxes.float()
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2  # (K, 2) x, y
    deviation = (sigma * half).clamp(min=MIN_SIGMA)
    along = [
        torch.exp(-0.5 * ((torch.arange(n, device=boxes.device) + 0.5 - centre[:, axis, None]) / deviation[:, axis, None]) ** 2)
        for axis, n in ((0, width), (1, height))
    ]  # fmt: skip
    bump = along[1][:, :, None] * along[0][:, None, :]  # (K, height, width)
    low, high = bump.amin((1, 2), keepdim=True), bump.amax((1, 2), keepdim=True)
    return (bump - low) / (high - low).clamp(min=1e-12)


def falip_bumps(boxes: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Gaussian bumps within regions, as the public code of FALIP has them: 1 in the middle, nearly 0 at the corners.

    A region's patches are those from `ceil(x1) - 1` to `ceil(x2) - 1`: a box that begins at the edge of a patch has the
    patch before it, too. The bump stands over the middle of these patches, is min-max normalised over them, and 0 outside.

    Args:
        boxes: (K, 4) x1, y1, x2, y2 in patches. height, width: of the grid of patches.
        sigma: standard deviation, in patches.

    Returns:
        (K, height, width) float32 in 0 … 1.
    """
    patches = torch.minimum(boxes.double().ceil().clamp(min=1), boxes.new_tensor([width, height] * 2)) - 1
    first, last = patches[:, :2, None], patches[:, 2:, None]  # (K, 2, 1) x, y
    x, y = (torch.arange(n, device=boxes.device) for n in (width, height))
    in_x, in_y = ((at >= first[:, axis]) & (at <= last[:, axis]) for axis, at in enumerate((x, y)))
    from_x, from_y = (at - (first[:, axis] + last[:, axis]) / 2 for axis, at in enumerate((x, y)))
    inside = in_y[:, :, None] & in_x[:, None, :]  # (K, height, width)
    bump = torch.exp(-0.5 * (from_y[:, :, None] ** 2 + from_x[:, None, :] ** 2) / sigma**2)
    low = bump.where(inside, torch.inf).amin((1, 2), keepdim=True)
    high = bump.where(inside, -torch.inf).amax((1, 2), keepdim=True)
    return ((bump - low + FALIP_EPSILON) / (high - low + FALIP_EPSILON)).where(inside, 0.0).float()
