"""What encoders share: the hardware's best precision, checked against fp32, and the fastest batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from clipray.analysis.tensors import native_bf16
from clipray.errors import ModelError
from clipray.models.packed import pack_weights

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Facts = dict[str, str | int | float]
MIN_COSINE = 0.999
TRY_S = 1.5  # for trying batch sizes

Network = TypeVar("Network", bound=torch.nn.Module)
Result = TypeVar("Result")


def native_precision(device: str) -> Precision:
    """bf16 where the hardware multiplies it natively (CUDA >= 8.0, a CPU with AMX or AVX512-BF16), else fp32."""
    return "bf16" if native_bf16(torch.device(device)) else "fp32"


def prove(
    load: Callable[[], Network],
    vectors: Callable[[Network, Precision], dict[str, torch.Tensor]],
    precision: str,
    device: str,
    sample: str,
) -> tuple[Network, Precision, float]:
    """The network at its precision, and that precision's cosine to fp32 on a sample, of the worst vector.

    Args:
        load: the network in fp32.
        vectors: what a network makes of the sample at a precision, (n, d) by feature.
        precision: `auto` takes the hardware's native one and falls back to fp32.
        sample: what it is, for a person.

    Raises:
        ModelError: the asked precision fails.
    """
    network = load()
    chosen: Any = native_precision(device) if precision == "auto" else precision
    if chosen == "fp32":
        return network, "fp32", 1.0
    exact = vectors(network, "fp32")
    network.to(DTYPES[chosen])  # in place: two copies of a large tower may not fit
    if chosen == native_precision("cpu") and device == "cpu":
        pack_weights(network)
    fast = vectors(network, chosen)
    cosines = {name: float(torch.cosine_similarity(exact[name], fast[name]).min().item()) for name in exact}
    worst = min(cosines, key=lambda name: cosines[name])
    if cosines[worst] >= MIN_COSINE:
        return network, chosen, cosines[worst]
    if precision == "auto":
        return load(), "fp32", 1.0
    raise ModelError(
        f"precision {chosen}: cosine to fp32 on the {sample} is {cosines[worst]:.5f} for {worst!r}, expected >= {MIN_COSINE}; use `precision: fp32`"
    )


class Batched:
    """An encoder that works in batches; out of the device's memory, they are halved for good.

    Attributes:
        device: `cpu` or `cuda`.
        batch_size: of the next batch.
        facts: device, precision, cosine of the check and batch size, for the table's record.
    """

    device: str
    batch_size: int
    facts: Facts

    def _in_batches(self, n: int, forward: Callable[[slice], Result]) -> list[Result]:
        """What `forward` makes of the rows 0 … n, batch by batch."""
        parts, start = [], 0
        while start < n:
            chosen = slice(start, min(n, start + self.batch_size))
            try:
                parts.append(forward(chosen))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self._take(max(1, self.batch_size // 2))
                torch.cuda.empty_cache()
                continue
            start = chosen.stop
        return parts

    def _take(self, batch_size: int) -> None:
        self.batch_size = self.facts["batch_size"] = batch_size

    def _find_batch_size(self, sizes: Sequence[int], encode: Callable[[int], object]) -> None:
        """Double the batch while that makes a row at least 3 % cheaper, within a few seconds. `encode`: so many rows."""
        best, best_s, began = sizes[0], float("inf"), time.perf_counter()
        self._take(best)
        if self.device == "cpu":
            encode(1)  # there a row costs alone what it costs among others
            if 3 * sizes[0] * (time.perf_counter() - began) > TRY_S:  # too slow to compare sizes
                return
        for size in sizes:
            self._take(size)
            try:
                encode(size)  # warm up: kernels are chosen per shape
                start = time.perf_counter()
                encode(size)
                seconds = (time.perf_counter() - start) / size
            except torch.OutOfMemoryError:
                break
            if self.batch_size < size or seconds > 0.97 * best_s:
                break
            best, best_s = size, seconds
            if time.perf_counter() - began + 4 * size * seconds > TRY_S:
                break
        self._take(best)
