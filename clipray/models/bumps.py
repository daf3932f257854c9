"""Regions of an image as bumps over a grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SIGMA = 0.5  # in patches: a narrower bump falls between their centres
FALIP_EPSILON = 1e-6  # of its min-max normalisation, so that patches of equal height are 1


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


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Mask images (K, height, width), any above 0 -> (K, 4) xyxy in px: the box of the same centre and spread.

    A mask that is a filled box gives that box: a side is √12 standard deviations of the mask's pixels. An empty mask
    gives the whole image.
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
