"""Loading an open_clip model, the same weights in every worker, and its transform in two halves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Normalize, ToTensor

from clipray.errors import ModelError
from clipray.models.geometry import keep_aspect_size, scaled_size, scaling_pixels
from clipray.models.preprocess import MAX_PIXELS, Preprocess, scaling_bytes
from clipray.models.resolve import ResolvedModel, folder_sha256, pair, quiet, sha256
from clipray.tables.reasons import Rejected


def register(config: str) -> None:
    """Make a config file known to open_clip, under the name of the file."""
    open_clip.add_model_config(config)


def load(model: ResolvedModel, device: str = "cpu") -> torch.nn.Module:
    """The open_clip model in fp32 and eval mode, its weights verified against `model.weights` where they are a file.

    Raises:
        ModelError: the weights do not fit the architecture, or are others than the driver saw.
    """
    if model.config:
        register(model.config)
    if model.name.startswith("local-dir:"):
        where, fingerprint = model.name, folder_sha256(Path(model.name.removeprefix("local-dir:")))
    elif model.pretrained and os.path.isfile(model.pretrained):
        where, fingerprint = model.pretrained, sha256(model.pretrained)
    else:
        where, fingerprint = model.name, model.weights  # a tag or a hub's name; the download is open_clip's
    if fingerprint != model.weights:
        raise ModelError(
            f"{where}: this machine's weights are not those that the run started with ({model.weights[:19]}…)"
        )
    with quiet(), torch.random.fork_rng(devices=[]):
        if model.seed is not None:
            torch.manual_seed(model.seed)
        try:
            network = open_clip.create_model(
                model.name, pretrained=model.pretrained, require_pretrained=model.seed is None
            )
        except Exception as error:  # open_clip and torch raise many kinds for weights that do not fit
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{model.name}: its weights could not be loaded from {model.pretrained or 'its source'}: {reason}"
            ) from error
    _check_preprocess(model, network.visual.preprocess_cfg)
    return network.eval().requires_grad_(False).to(device)


def _check_preprocess(model: ResolvedModel, settings: dict[str, Any]) -> None:
    """Images are decoded apart from the network: both must mean the same transform."""
    settings = settings | {"size": pair(settings["size"])}
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    if settings != model.preprocess:
        raise ModelError(
            f"{model.name}: expected preprocessing {model.preprocess}, but the loaded network has {settings}"
        )


def too_large_scaled(height: int, width: int, scaled: tuple[int, int], max_pixels: int) -> str | None:
    """Why an image of `height` x `width` px is not scaled to `scaled` (height, width), or None if it may be.

    Pillow makes the whole scaled image before anything is cropped: of a thin image it is far larger than the input.
    """
    if scaling_pixels(height, width, scaled) <= max_pixels:
        return None
    return (
        f"{height} x {width} px, which the model's preprocessing scales to {scaled[0]} x {scaled[1]} px: "
        f"more than max_pixels={max_pixels}"
    )


def _check_scaled(image: Image.Image, scaled: tuple[int, int], max_pixels: int) -> None:
    message = too_large_scaled(image.height, image.width, scaled, max_pixels)
    if message:
        raise Rejected("decode", "too_many_pixels", message)


def _resample(model: ResolvedModel) -> Image.Resampling:
    return Image.Resampling[str(model.preprocess["interpolation"]).upper().replace("RANDOM", "BICUBIC")]


def _covered(image: Image.Image, height: int, width: int) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of what an image shows of its original of `height` x `width` px; None for all of it.

    A JPEG decoded at a half, a quarter or an eighth has its sides rounded up: its last row and column may be half empty.
    """
    if image.size == (width, height):
        return None
    scale = 2 ** round(np.log2(max(height, width) / max(image.size)))
    return 0, 0, min(width / scale, image.width), min(height / scale, image.height)


def keeping_aspect(
    model: ResolvedModel, long_px: int, multiple: int, max_pixels: int = MAX_PIXELS, *, rounded: bool = False
) -> Preprocess:
    """To (H, W, 3) uint8 of the whole image: no crop, the long side `long_px`, both sides a `multiple`.

    `rounded`: as in `split_transform`. What is returned raises Rejected: too_many_pixels.
    """
    resample = _resample(model)

    def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
        size = keep_aspect_size(height, width, long_px, multiple)
        _check_scaled(image, size, max_pixels)
        box = None if rounded else _covered(image, height, width)
        return np.asarray(image.resize(size[::-1], resample, box=box), dtype=np.uint8)

    def scratch_bytes(height: int, width: int) -> int:
        return scaling_bytes(height, width, keep_aspect_size(height, width, long_px, multiple))

    return Preprocess(to_pixels, scratch_bytes)


def split_transform(
    model: ResolvedModel, max_pixels: int = MAX_PIXELS, *, rounded: bool = False
) -> tuple[Preprocess, torch.Tensor, torch.Tensor]:
    """open_clip's own inference transform in two halves: pixels on the CPU, normalisation on the device.

    A JPEG that was decoded smaller is scaled by the sides of its original.
    `rounded`: by its own sides, which are rounded up, as in tables of earlier versions.

    Returns:
        (what makes a PIL image (H, W, 3) uint8, mean (3, 1, 1) float32, std (3, 1, 1) float32); the first raises
        Rejected: too_many_pixels, where the image would be scaled to more than `max_pixels`.
    """
    transform = image_transform_v2(PreprocessCfg(**model.preprocess), is_train=False)
    normalize = next(t for t in transform.transforms if isinstance(t, Normalize))
    steps = [
        t
        for t in transform.transforms
        if not isinstance(t, (Normalize, ToTensor)) and type(t).__name__ != "MaybeToTensor"
    ]

    def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
        if rounded:
            height, width = image.height, image.width
        scaled = scaled_size(height, width, model.preprocess)
        _check_scaled(image, scaled, max_pixels)
        if image.size != (width, height):
            image = image.resize(scaled[::-1], _resample(model), box=_covered(image, height, width))
        for step in steps:
            image = step(image)
        return np.asarray(image, dtype=np.uint8)

    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (normalize.mean, normalize.std))

    def scratch_bytes(height: int, width: int) -> int:
        return scaling_bytes(height, width, scaled_size(height, width, model.preprocess))

    return Preprocess(to_pixels, scratch_bytes), mean, std
