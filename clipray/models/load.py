"""Loading a model, the same weights in every worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipray.errors import ModelError, one_line
from clipray.models import timm_models
from clipray.models.geometry import pair
from clipray.models.hf_models import folder_of
from clipray.models.hf_models import load as load_transformers
from clipray.models.resolve import CONFIGS, ResolvedModel
from clipray.models.weights import folder_sha256, quiet, sha256


def load(model: ResolvedModel, device: str = "cpu") -> torch.nn.Module:
    """The network in fp32 and eval mode, its weights verified against `model.weights` where they are files.

    One of open_clip, a `TimmTower` or a `HuggingFaceNetwork`.

    Raises:
        ModelError: the weights do not fit the architecture, or are others than the driver saw.
    """
    _check_weights(model)
    with quiet(), torch.random.fork_rng(devices=[]):
        if model.seed is not None:
            torch.manual_seed(model.seed)
        try:
            network = _made(model)
        except Exception as error:  # these libraries and torch raise many kinds for weights that do not fit
            reason = one_line(error) or type(error).__name__
            source = model.pretrained or "its source"
            raise ModelError(f"{model.name}: its weights could not be loaded from {source}: {reason}") from error
    if model.library == "open_clip":
        _check_preprocess(model, network.visual.preprocess_cfg)
    return network.eval().requires_grad_(False).to(device)


def _check_weights(model: ResolvedModel) -> None:
    """Raises ModelError: the files on this machine are others than the driver saw."""
    if model.name.startswith("local-dir:"):
        folder = Path(model.name.removeprefix("local-dir:"))
        where, fingerprint = model.name, folder_sha256(folder, CONFIGS[model.library])
    elif model.pretrained and os.path.isfile(model.pretrained):
        where, fingerprint = model.pretrained, sha256(model.pretrained)
    elif model.library == "transformers":
        where, fingerprint = model.name, folder_sha256(folder_of(model.name), CONFIGS[model.library])
    elif model.library == "timm" and model.seed is None and not model.pretrained:
        where, fingerprint = model.name, sha256(timm_models.own_checkpoint(model.name))
    else:
        return  # random weights, or open_clip's tag or hub's name; the download is the library's
    if fingerprint != model.weights:
        raise ModelError(
            f"{where}: this machine's weights are not those that the run started with ({model.weights[:19]}…)"
        )


def _made(model: ResolvedModel) -> Any:
    """The network, with its weights, by the library that makes it."""
    if model.library == "timm":
        return _timm(model)
    if model.library == "transformers":
        return load_transformers(model.name)
    if model.config:  # a file, which gives the model its name
        open_clip.add_model_config(model.config)
    return open_clip.create_model(model.name, pretrained=model.pretrained, require_pretrained=model.seed is None)


def _timm(model: ResolvedModel) -> timm_models.TimmTower:
    if model.pretrained:
        return timm_models.create_from(model.name, model.pretrained)
    if model.name.startswith("local-dir:"):
        folder = Path(model.name.removeprefix("local-dir:"))
        return timm_models.create_from(model.name, timm_models.best_weights(folder))
    return timm_models.create(model.name, own_weights=model.seed is None)


def _check_preprocess(model: ResolvedModel, settings: dict[str, Any]) -> None:
    """Images are decoded apart from the network: both must mean the same transform."""
    settings = settings | {"size": pair(settings["size"])}
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    if settings != model.preprocess:
        raise ModelError(
            f"{model.name}: expected preprocessing {model.preprocess}, but the loaded network has {settings}"
        )
