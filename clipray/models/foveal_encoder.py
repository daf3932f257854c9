"""A steered image tower as an encoder: checked against fp32, in batches, vectors normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipray.analysis.normalize import l2_normalize_tensor
from clipray.job import VECTOR, Foveal
from clipray.models.features import Features
from clipray.models.foveal import FovealTower
from clipray.models.image_encoder import ImageEncoder, image_tower
from clipray.models.load import load
from clipray.models.resolve import ResolvedModel

MIDDLE = (0.25, 0.25, 0.75, 0.75)  # the region on which an encoder checks its precision, as a share of the image


class FovealNetwork(torch.nn.Module):
    """A `FovealTower` as an encoder's network: normalised vectors of boxes, or, without any, of the image's middle."""

    def __init__(self, tower: torch.nn.Module, foveal: Foveal, normalize: bool) -> None:
        super().__init__()
        self.foveal, self._normalize = FovealTower(tower, foveal), normalize

    def forward(self, batch: Tensor, boxes: Tensor | None = None, owner: Tensor | None = None) -> Features[Tensor]:
        """As `FeatureNetwork.forward`; the vectors are float32."""
        if boxes is None or owner is None:
            middle = torch.tensor(MIDDLE, device=batch.device) * torch.tensor(
                [*batch.shape[:1:-1]] * 2, device=batch.device
            )
            vectors = self.foveal(batch, middle.expand(len(batch), 4), torch.arange(len(batch), device=batch.device))
            return Features({VECTOR: self._finished(vectors)})
        return Features({}, boxes=self._finished(self.foveal(batch, boxes, owner)))

    def _finished(self, vectors: Tensor) -> Tensor:
        return l2_normalize_tensor(vectors.float()) if self._normalize else vectors.float()


class FovealEncoder(ImageEncoder):
    """An `ImageEncoder` whose images come with boxes, and that gives a vector for each box."""

    def __init__(self, model: ResolvedModel, foveal: Foveal, **how: Any) -> None:
        self._foveal = foveal
        super().__init__(model, **how)

    def _load(self) -> Any:
        return FovealNetwork(image_tower(load(self.model, self.device)), self._foveal, self._normalize)
