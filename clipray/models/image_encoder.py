"""Encodes images: the hardware's best precision, checked against fp32, and the fastest batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

import numpy as np
import open_clip
import torch

from clipray.job import VECTOR, Feature, Foveal
from clipray.models.encoder import DTYPES, Encoder, EncoderOptions, Precision
from clipray.models.features import FeatureNetwork, Features, joined
from clipray.models.foveal import FovealNetwork
from clipray.models.hf_models import HuggingFaceNetwork
from clipray.models.load import load
from clipray.models.resolve import ResolvedModel
from clipray.models.timm_models import TimmTower

ImageNetwork = FeatureNetwork | FovealNetwork


def image_tower(network: Any) -> torch.nn.Module:
    """The part that `encode_image` runs, so that the text tower takes no memory; a network of another make stays whole."""
    if isinstance(network, open_clip.CLIP | open_clip.CustomTextCLIP):
        return network.visual
    if isinstance(network, TimmTower | HuggingFaceNetwork):
        return network
    return _EncodeImage(network)


class _EncodeImage(torch.nn.Module):
    """`encode_image` as a module, raw vectors (CoCa's own default is to normalise them)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.encode_image(image, normalize=False)


def mean_and_std(model: ResolvedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What normalises pixels in 0 … 1 as the model's own transform does, (channels or 1, 1, 1) float32 each."""
    mean, std = (torch.tensor(model.preprocess[key], dtype=torch.float32).view(-1, 1, 1) for key in ("mean", "std"))
    return mean, std


def sample_image(height: int, width: int) -> np.ndarray:
    """The image on which an encoder checks its precision: gradients, a disc and a checkerboard; (height, width, 3) uint8."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = (y - 0.4) ** 2 + (x - 0.6) ** 2 < 0.06
    checks = ((y * 8).astype(int) + (x * 8).astype(int)) % 2 == 0
    channels = [np.where(disc, 0.9, y), np.where(disc, 0.2, x), np.where(checks, 0.75, 0.25)]
    return (np.stack(channels, axis=-1) * 255).round().astype(np.uint8)


class ImageEncoder(Encoder[ImageNetwork]):
    """An image tower as an `Encoder`, whose arguments and attributes it has.

    Args:
        features: the vectors to compute, by name; by default the CLIP vector, `clip`.
        foveal: how attention is turned to boxes. Then images come with boxes, and it gives a vector for each of them.

    Attributes:
        image_size: (height, width) in px of its input.
    """

    sample = "test image"
    gpu_sizes = (32, 64, 128, 256, 512)

    def __init__(
        self,
        model: ResolvedModel,
        *,
        features: Mapping[str, Feature] | None = None,
        foveal: Foveal | None = None,
        **options: Unpack[EncoderOptions],
    ) -> None:
        self._features, self._foveal, self.image_size = features or {VECTOR: Feature()}, foveal, model.image_size
        self._mean, self._std = (x.to(options.get("device", "cpu")) for x in mean_and_std(model))
        super().__init__(model, **options)

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
        self, network: ImageNetwork, pixels: np.ndarray, precision: str, boxes: Sequence[np.ndarray] | None = None
    ) -> Features[torch.Tensor]:
        batch = torch.from_numpy(pixels).to(self.device, non_blocking=True)  # (b, height, width, 3)
        batch = batch.permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)  # as ToTensor does
        batch = batch.sub_(self._mean).div_(self._std).to(DTYPES[precision])
        if boxes is None:
            return cast(Features[torch.Tensor], network(batch))
        together = torch.from_numpy(np.concatenate(boxes).astype(np.float32)).to(self.device)  # (K, 4)
        owner = torch.repeat_interleave(torch.tensor([len(b) for b in boxes])).to(self.device)  # (K,)
        return cast(Features[torch.Tensor], network(batch, together, owner))

    def _load(self) -> ImageNetwork:
        tower = image_tower(load(self.model, self.device))
        if self._foveal:
            return FovealNetwork(tower, self._foveal, self._normalize)
        return FeatureNetwork(tower, self._features, self._normalize)

    def _sample_vectors(self, network: ImageNetwork, precision: Precision) -> dict[str, torch.Tensor]:
        return self._forward(network, sample_image(*self.image_size)[None], precision).vectors

    def _encode_sample(self, size: int) -> object:
        return self.encode(np.repeat(sample_image(*self.image_size)[None], size, axis=0))
