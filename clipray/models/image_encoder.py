"""Encodes images: the hardware's best precision, checked against fp32, and the fastest batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import open_clip
import torch

from clipray.job import Feature
from clipray.models.features import FeatureNetwork, Features, joined
from clipray.models.load import load, split_transform
from clipray.models.precision import DTYPES, Batched, prove
from clipray.models.resolve import ResolvedModel


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


def sample_image(height: int, width: int) -> np.ndarray:
    """The image on which an encoder checks its precision: gradients, a disc and a checkerboard; (height, width, 3) uint8."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = (y - 0.4) ** 2 + (x - 0.6) ** 2 < 0.06
    checks = ((y * 8).astype(int) + (x * 8).astype(int)) % 2 == 0
    channels = [np.where(disc, 0.9, y), np.where(disc, 0.2, x), np.where(checks, 0.75, 0.25)]
    return (np.stack(channels, axis=-1) * 255).round().astype(np.uint8)


class ImageEncoder(Batched):
    """An open_clip image tower whose precision has been checked.

    Args:
        model: what to load.
        precision: `auto` takes the hardware's native one and falls back to fp32 if its check fails.
        device: `cpu` or `cuda`.
        batch_size: `auto` tries a few and keeps the fastest.
        features: the vectors to compute, by name; by default the CLIP vector, `clip`.
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
        with torch.inference_mode():
            self.network, self.precision, cosine = prove(
                self._load, self._sample_vectors, precision, device, "test image"
            )
        self.facts = {"device": device, "precision": self.precision, "self_check_cosine": round(cosine, 6)}
        if batch_size == "auto":
            sizes = (16, 32, 64, 128, 256) if device == "cpu" else (32, 64, 128, 256, 512)
            sample = sample_image(*self.image_size)[None]
            self._find_batch_size(sizes, lambda size: self.encode(np.repeat(sample, size, axis=0)))
        else:
            self._take(batch_size)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, boxes: Sequence[np.ndarray] | None = None) -> Features[np.ndarray]:
        """Encode n images of one size. Out of GPU memory, the batch is halved for good.

        Args:
            pixels: (n, height, width, 3) uint8.
            boxes: for each image (K_i, 4) float32 x1, y1, x2, y2 in px of `pixels`.
        """
        return joined(
            self._in_batches(
                len(pixels),
                lambda chosen: self._forward(self.network, pixels[chosen], self.precision, boxes and boxes[chosen]),
            )
        )

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

    def _sample_vectors(self, network: FeatureNetwork, precision: str) -> dict[str, torch.Tensor]:
        return self._forward(network, sample_image(*self.image_size)[None], precision).vectors

    def _load(self) -> FeatureNetwork:
        return FeatureNetwork(image_tower(load(self.model, self.device)), self._features, self._normalize)
