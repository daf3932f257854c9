"""Networks without weights: their shapes, for nothing but the time to build them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def trial(network: torch.nn.Module, image_size: tuple[int, int]) -> Any:
    """What a network makes of one black image of (height, width) px."""
    like = next(network.parameters())
    with torch.no_grad(), like.device:  # the device also of what a network makes on its way
        return network(torch.zeros(1, 3, *image_size, dtype=like.dtype))


def without_weights(build: Callable[[], torch.nn.Module], image_size: tuple[int, int] | None = None) -> torch.nn.Module:
    """A network on torch's `meta` device, in eval mode; if it does not run there, random on the CPU.

    Args:
        build: makes the network, on torch's default device.
        image_size: (height, width) in px; by default the network's own `image_size`.
    """

    def built(device: str) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return build().eval().requires_grad_(False)

    with contextlib.suppress(Exception):  # an operation without a `meta` form; torch and timm raise many kinds
        network: Any = built("meta")
        trial(network, image_size or network.image_size)
        return network
    return built("cpu")
