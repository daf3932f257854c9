"""Vectors as tensors, and in which precision the hardware multiplies them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Precision = Literal["bf16", "fp32"]


def native_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 itself: AMX, AVX512-BF16, CUDA from 8.0 on."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))


def as_tensor(x: np.ndarray | Tensor) -> Tensor:
    """`x` as float16, bfloat16 or float32, over the same memory if it can be; never to be written to."""
    if isinstance(x, np.ndarray):
        x = np.ascontiguousarray(x, dtype=None if x.dtype in (np.float16, np.float32) else np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written to: none is
            x = torch.from_numpy(x)
    return (x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.float()).contiguous()


@contextlib.contextmanager
def few_threads() -> Iterator[None]:
    """Within it torch uses half of its threads: a query is short, and threads that wait for each other make it longer.

    On 2 busy cores two threads took ten times as long as one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)
