"""The image tower at work: the hardware's best precision, proved against fp32, and the fastest batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import open_clip
import torch

from clipray.encoders.features import FeatureNetwork, Features, joined
from clipray.encoders.models import load, split_transform
from clipray.encoders.resolve import ResolvedModel
from clipray.errors import ModelError
from clipray.settings import Feature

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_COSINE = 0.999


def image_tower(network: Any) -> torch.nn.Module:
    """The part that `encode_image` runs, so that the text tower takes no memory; a network of another make stays whole."""
    if isinstance(network, open_clip.CLIP | open_clip.CustomTextCLIP):
        return network.visual
    return _EncodeImage(network)


class _EncodeImage(torch.nn.Module):
    """`encode_image` as a module, raw vectors (CoCa's own default is to normalise them)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.encode_image(image, normalize=False)


def native_precision(device: str) -> Precision:
    """bf16 where the hardware multiplies it natively (CUDA >= 8.0, a CPU with AMX or AVX512-BF16), else fp32."""
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    flags = torch.cpu.get_capabilities()
    return "bf16" if flags.get("amx_bf16") or flags.get("avx512_bf16") else "fp32"


def sample_picture(height: int, width: int) -> np.ndarray:
    """The picture on which an encoder proves itself: gradients, a disc and a checkerboard; (height, width, 3) uint8."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = (y - 0.4) ** 2 + (x - 0.6) ** 2 < 0.06
    checks = ((y * 8).astype(int) + (x * 8).astype(int)) % 2 == 0
    channels = [np.where(disc, 0.9, y), np.where(disc, 0.2, x), np.where(checks, 0.75, 0.25)]
    return (np.stack(channels, axis=-1) * 255).round().astype(np.uint8)


class ImageEncoder:
    """An open_clip image tower that has proved its precision.

    Args:
        model: what to load.
        precision: `auto` takes the hardware's native one and falls back to fp32 if its check fails.
        device: `cpu` or `cuda`.
        batch_size: `auto` tries a few and keeps the fastest.
        features: what to make of each picture, by name; alone the CLIP vector, `clip`.
        normalize: L2-normalise the vectors.

    Attributes:
        image_size: (height, width) in px of its input.
        facts: device, precision, cosine of the check and batch size, for the table's record.

    Raises:
        ModelError: the weights do not load, or the asked precision fails its check.
    """

    def __init__(
        self,
        model: ResolvedModel,
        *,
        features: Mapping[str, Feature] | None = None,
        precision: str = "auto",
        device: str = "cpu",
        batch_size: int | Literal["auto"] = "auto",
        normalize: bool = True,
    ) -> None:
        self.device = device
        self.model, self._features, self._normalize = model, features or {"clip": Feature()}, normalize
        mean, std = split_transform(model)[1:]
        self._mean, self._std = mean.to(device), std.to(device)
        self.image_size = model.image_size
        self.network, self.precision, cosine = self._prove(precision)
        self.batch_size = self._fastest_batch() if batch_size == "auto" else batch_size
        self.facts = {
            "device": device,
            "precision": self.precision,
            "self_check_cosine": round(cosine, 6),
            "batch_size": self.batch_size,
        }

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, boxes: Sequence[np.ndarray] | None = None) -> Features[np.ndarray]:
        """Encode n pictures of one size. Out of GPU memory, the batch is halved for good.

        Args:
            pixels: (n, height, width, 3) uint8.
            boxes: for each picture (K_i, 4) float32 x1, y1, x2, y2 in px of `pixels`.
        """
        parts, start = [], 0
        while start < len(pixels):
            chosen = slice(start, start + self.batch_size)
            try:
                parts.append(self._forward(self.network, pixels[chosen], self.precision, boxes and boxes[chosen]))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                self.facts["batch_size"] = self.batch_size
                torch.cuda.empty_cache()
                continue
            start = chosen.stop
        return joined(parts)

    def _forward(
        self, network: FeatureNetwork, pixels: np.ndarray, precision: str, boxes: Sequence[np.ndarray] | None = None
    ) -> Features[torch.Tensor]:
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)  # (b, height, width, 3)
        batch = batch.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)  # as ToTensor does
        batch = batch.sub_(self._mean).div_(self._std).to(DTYPES[precision])
        if boxes is None:
            return cast(Features[torch.Tensor], network(batch))
        together = torch.from_numpy(np.concatenate(boxes).astype(np.float32)).to(self.device)  # (K, 4)
        owner = torch.repeat_interleave(torch.tensor([len(b) for b in boxes])).to(self.device)  # (K,)
        return cast(Features[torch.Tensor], network(batch, together, owner))

    @torch.inference_mode()
    def _prove(self, precision: str) -> tuple[FeatureNetwork, Precision, float]:
        """The network at its precision, and that precision's cosine to fp32 on a test picture, of the worst feature."""
        network = self._load()
        chosen: Any = native_precision(self.device) if precision == "auto" else precision
        if chosen == "fp32":
            return network, "fp32", 1.0
        sample = sample_picture(*self.image_size)[None]
        exact = self._forward(network, sample, "fp32").vectors
        network.to(DTYPES[chosen])  # in place: two copies of a large tower may not fit
        fast = self._forward(network, sample, chosen).vectors
        cosines = {name: float(torch.cosine_similarity(exact[name], fast[name]).item()) for name in exact}
        worst = min(cosines, key=lambda name: cosines[name])
        if cosines[worst] >= MIN_COSINE:
            return network, chosen, cosines[worst]
        if precision == "auto":
            return self._load(), "fp32", 1.0
        raise ModelError(
            f"precision {chosen}: cosine to fp32 on the test picture is {cosines[worst]:.5f} for {worst!r}, expected >= {MIN_COSINE}; use `precision: fp32`"
        )

    def _load(self) -> FeatureNetwork:
        return FeatureNetwork(image_tower(load(self.model, self.device)), self._features, self._normalize)

    def _fastest_batch(self) -> int:
        """Double the batch while that makes a picture at least 3 % cheaper, within a few seconds."""
        sizes = (16, 32, 64, 128, 256) if self.device == "cpu" else (32, 64, 128, 256, 512)
        best, best_s, began = sizes[0], float("inf"), time.perf_counter()
        self.batch_size = sizes[0]
        for size in sizes:
            batch = np.repeat(sample_picture(*self.image_size)[None], size, axis=0)
            self.batch_size = size
            try:
                self.encode(batch)  # warm up: kernels are chosen per shape
                start = time.perf_counter()
                self.encode(batch)
                seconds = (time.perf_counter() - start) / size
            except torch.OutOfMemoryError:
                break
            if self.batch_size < size or seconds > 0.97 * best_s:
                break
            best, best_s = size, seconds
            if time.perf_counter() - began + 4 * size * seconds > 1.5:
                break
        return best
