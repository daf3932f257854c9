"""The image tower at work: the hardware's best precision, proved against fp32, and the fastest batch."""

from __future__ import annotations

import time
from typing import Any, Literal

import numpy as np
import open_clip
import torch

from clipray.encoders.models import load, split_transform
from clipray.encoders.resolve import ResolvedModel
from clipray.errors import ModelError

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
        normalize: L2-normalise the vectors.

    Attributes:
        image_size: (height, width) in px of its input.
        preprocess: PIL image -> (height, width, 3) uint8.
        facts: device, precision, cosine of the check and batch size, for the table's record.

    Raises:
        ModelError: the weights do not load, or the asked precision fails its check.
    """

    def __init__(
        self,
        model: ResolvedModel,
        *,
        precision: str = "auto",
        device: str = "cpu",
        batch_size: int | Literal["auto"] = "auto",
        normalize: bool = True,
    ) -> None:
        self.device, self.normalize = device, normalize
        self._model = model
        self.preprocess, mean, std = split_transform(model)
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
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """(n, height, width, 3) uint8 -> (n, d) float32. Out of GPU memory, the batch is halved for good."""
        parts, start = [], 0
        while start < len(pixels):
            part = pixels[start : start + self.batch_size]
            try:
                parts.append(self._forward(self.network, part, DTYPES[self.precision]))
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
                self.batch_size = max(1, self.batch_size // 2)
                self.facts["batch_size"] = self.batch_size
                torch.cuda.empty_cache()
                continue
            start += len(part)
        return np.concatenate(parts)

    def _forward(self, network: torch.nn.Module, pixels: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)  # (b, height, width, 3)
        batch = batch.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)  # as ToTensor does
        features = network(batch.sub_(self._mean).div_(self._std).to(dtype)).float()  # (b, d)
        if self.normalize:
            features = torch.nn.functional.normalize(features, dim=-1)
        return features.cpu().numpy()

    @torch.inference_mode()
    def _prove(self, precision: str) -> tuple[torch.nn.Module, Precision, float]:
        """The network at its precision, and that precision's cosine to fp32 on a test picture."""
        network = image_tower(load(self._model, self.device))
        chosen: Any = native_precision(self.device) if precision == "auto" else precision
        if chosen == "fp32":
            return network, "fp32", 1.0
        sample = sample_picture(*self.image_size)[None]
        exact = self._forward(network, sample, torch.float32)[0]
        network.to(DTYPES[chosen])  # in place: two copies of a large tower may not fit
        fast = self._forward(network, sample, DTYPES[chosen])[0]
        cosine = float(exact @ fast / max(np.linalg.norm(exact) * np.linalg.norm(fast), 1e-12))
        if cosine >= MIN_COSINE:
            return network, chosen, cosine
        if precision == "auto":
            return image_tower(load(self._model, self.device)), "fp32", 1.0
        raise ModelError(
            f"precision {chosen}: cosine to fp32 on the test picture is {cosine:.5f}, expected >= {MIN_COSINE}; use `precision: fp32`"
        )

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
