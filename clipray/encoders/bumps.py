"""Regions of a picture as bumps over a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SIGMA = 0.5  # in patches: a narrower bump falls between their centres


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


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Mask pictures (K, height, width), any above 0 -> (K, 4) xyxy in px: the box of the same centre and spread.

    A mask that is a filled box gives that box: a side is √12 standard deviations of the mask's pixels. An empty mask
    gives the whole picture.
    """
    inside = (masks > 0).float()
    inside = torch.where(inside.sum((1, 2), keepdim=True) > 0, inside, torch.ones_like(inside))
    sides = []
    for axis, n in ((1, masks.shape[2]), (2, masks.shape[1])):  # x, y
        share = inside.sum(axis) / inside.sum((1, 2))[:, None]  # (K, n)
        at = torch.arange(n, device=masks.device) + 0.5
        mean = (share * at).sum(1)
        spread = (share * (at - mean[:, None]) ** 2).sum(1) + 1 / 12  # a pixel is not a point
        sides.append((mean, (3 * spread).sqrt()))
    return torch.stack([m - s for m, s in sides] + [m + s for m, s in sides], dim=1)
