"""What encoders share: the hardware's best precision, checked against fp32, and the fastest batch."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, TypedDict, TypeVar

import torch

from clipray.analysis.tensors import native_bf16
from clipray.errors import ModelError
from clipray.models.packed import pack_weights
from clipray.models.resolve import ResolvedModel

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_COSINE = 0.999
TRY_S = 1.5  # for trying batch sizes
CPU_SIZES = (16, 32, 64, 128, 256)  # of batches that are tried

Network = TypeVar("Network", bound=torch.nn.Module)
Result = TypeVar("Result")


def native_precision(device: str) -> Precision:
    """bf16 where the hardware multiplies it natively (CUDA >= 8.0, a CPU with AMX or AVX512-BF16), else fp32."""
    return "bf16" if native_bf16(torch.device(device)) else "fp32"


class EncoderOptions(TypedDict, total=False):
    """What every encoder takes beside its model; see `Encoder`."""

    precision: str
    device: str
    batch_size: int | Literal["auto"]
    normalize: bool


class Encoder(ABC, Generic[Network]):
    """A network that encodes in batches; out of the device's memory, they are halved for good.

    Args:
        model: what to load.
        precision: `auto` takes the hardware's native one and falls back to fp32 if its check fails.
        device: `cpu` or `cuda`.
        batch_size: `auto` tries a few and keeps the fastest.
        normalize: L2-normalise the vectors.

    Attributes:
        batch_size: of the next batch.
        facts: device, precision, cosine of the check and batch size, for the table's record.

    Raises:
        ModelError: the weights do not load, or the asked precision fails its check.
    """

    sample: ClassVar[str]  # on which the precision is checked, for a person
    gpu_sizes: ClassVar[tuple[int, ...]]  # of batches that are tried

    def __init__(
        self,
        model: ResolvedModel,
        *,
        precision: str = "auto",
        device: str = "cpu",
        batch_size: int | Literal["auto"] = "auto",
        normalize: bool = True,
    ) -> None:
        self.model, self.device, self._normalize = model, device, normalize
        with torch.inference_mode():
            self.network, self.precision, cosine = self._checked(precision)
        self.facts: dict[str, str | int | float] = {"device": device, "precision": self.precision}
        self.facts["self_check_cosine"] = round(cosine, 6)
        if batch_size == "auto":
            self._find_batch_size()
        else:
            self._take(batch_size)

    @abstractmethod
    def _load(self) -> Network:
        """The network in fp32."""

    @abstractmethod
    def _sample_vectors(self, network: Network, precision: Precision) -> dict[str, torch.Tensor]:
        """What a network makes of the sample at a precision, (n, d) by feature."""

    @abstractmethod
    def _encode_sample(self, size: int) -> object:
        """Encode a batch of `size`, whose time is measured."""

    def _checked(self, precision: str) -> tuple[Network, Precision, float]:
        """The network at its precision, and that precision's cosine to fp32 on the sample, of the worst vector."""
        network = self._load()
        chosen: Any = native_precision(self.device) if precision == "auto" else precision
        if chosen == "fp32":
            return network, "fp32", 1.0
        exact = self._sample_vectors(network, "fp32")
        network.to(DTYPES[chosen])  # in place: two copies of a large tower may not fit
        if chosen == native_precision("cpu") and self.device == "cpu":
            pack_weights(network)
        fast = self._sample_vectors(network, chosen)
        cosines = {name: float(torch.cosine_similarity(exact[name], fast[name]).min().item()) for name in exact}
        worst = min(cosines, key=lambda name: cosines[name])
        if cosines[worst] >= MIN_COSINE:
            return network, chosen, cosines[worst]
        if precision == "auto":
            return self._load(), "fp32", 1.0
        raise ModelError(
            f"precision {chosen}: cosine to fp32 on the {self.sample} is {cosines[worst]:.5f} for {worst!r}, "
            f"expected >= {MIN_COSINE}; use `precision: fp32`"
        )

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

    def _find_batch_size(self) -> None:
        """Double the batch while that makes a row at least 3 % cheaper, within a few seconds."""
        sizes = CPU_SIZES if self.device == "cpu" else self.gpu_sizes
        best, best_s, began = sizes[0], float("inf"), time.perf_counter()
        self._take(best)
        if self.device == "cpu":
            self._encode_sample(1)  # there a row costs alone what it costs among others
            if 3 * sizes[0] * (time.perf_counter() - began) > TRY_S:  # too slow to compare sizes
                return
        for size in sizes:
            self._take(size)
            try:
                self._encode_sample(size)  # warm up: kernels are chosen per shape
                start = time.perf_counter()
                self._encode_sample(size)
                seconds = (time.perf_counter() - start) / size
            except torch.OutOfMemoryError:
                break
            if self.batch_size < size or seconds > 0.97 * best_s:
                break
            best, best_s = size, seconds
            if time.perf_counter() - began + 4 * size * seconds > TRY_S:
                break
        self._take(best)
