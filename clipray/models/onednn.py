"""Linear layers whose weights lie as oneDNN multiplies them, on a CPU that multiplies bf16.

The operators are the ones that torch's compiler uses for frozen weights. They are no public interface: ask `packs` first,
and do without them where a torch lacks them.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor


def packs() -> bool:
    """Whether this torch has the operators, and this CPU what they need for bf16."""
    names = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    there = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor, rows: int | None = None) -> Tensor:
    """(out, in) bf16 -> the same, opaque; its `to_dense()` is the plain one. rows: of a batch, where that is known."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows))


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, then: Literal["none", "sigmoid"] = "none") -> Tensor:
    """(…, in) -> (…, out), bf16; `then` is taken of the float32 sums, before they are rounded."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, then, [], ""))
