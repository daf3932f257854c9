"""Loading an open_clip model, the same weights in every worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipray.errors import ModelError, one_line
from clipray.models.geometry import pair
from clipray.models.resolve import ResolvedModel, folder_sha256, quiet, sha256


def load(model: ResolvedModel, device: str = "cpu") -> torch.nn.Module:
    """The open_clip model in fp32 and eval mode, its weights verified against `model.weights` where they are a file.

    Raises:
        ModelError: the weights do not fit the architecture, or are others than the driver saw.
    """
    if model.config:  # a file, which gives the model its name
        open_clip.add_model_config(model.config)
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
            reason = one_line(error)
            source = model.pretrained or "its source"
            raise ModelError(f"{model.name}: its weights could not be loaded from {source}: {reason}") from error
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
