"""timm's vision models: their names, their preprocessing, and the networks themselves."""

from __future__ import annotations

import contextlib
import difflib
import math
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from timm.models import (
    PretrainedCfg,
    get_deprecated_models,
    get_pretrained_cfg,
    is_model,
    list_models,
    list_pretrained,
    load_state_dict,
)

from clipray.errors import ModelError
from clipray.models.dry_run import trial, without_weights
from clipray.models.weights import downloaded, folder_weights, quiet

PREFIX = "timm/"
CONFIG = "config.json"
BIN = "pytorch_model.bin"
RESIZE_MODES = {"center": "shortest", "border": "longest", "squash": "squash"}
"""timm's `crop_mode` -> open_clip's `resize_mode`."""


class TimmTower(torch.nn.Module):
    """A timm network as an image tower: normalised images (b, 3, height, width) -> (b, d), its features before the classifier.

    Attributes:
        trunk: timm's network.
        image_size: (height, width) in px of its input.
    """

    def __init__(self, trunk: torch.nn.Module) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.image_size: tuple[int, int] = tuple(data_config(trunk)["input_size"][1:])

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.trunk(batch)


def create(name: str, *, own_weights: bool = False) -> TimmTower:
    """A network with random weights, or with those that the name itself brings.

    Args:
        name: `timm/NAME`, `hf-hub:…` or `local-dir:…`.
    """
    return TimmTower(timm.create_model(name.removeprefix(PREFIX), pretrained=own_weights, num_classes=0))


def create_from(name: str, checkpoint: str) -> TimmTower:
    """A network with the weights of a checkpoint in timm's own names; its classifier is left out.

    Raises:
        RuntimeError: the checkpoint has other weights, or too few or too many.
    """
    tower = create(name)
    state = load_state_dict(checkpoint, device="cpu", weights_only=True)
    heads = tower.trunk.pretrained_cfg.get("classifier") or ()
    heads = [heads] if isinstance(heads, str) else heads
    prefixes = tuple(f"{head.partition('.')[0]}." for head in heads)  # `head.fc`: a norm beside it goes with it
    wanted = tower.trunk.state_dict()
    kept = {key: value for key, value in state.items() if key in wanted or not key.startswith(prefixes)}
    tower.trunk.load_state_dict(kept, strict=True)
    return tower


def describe(name: str) -> tuple[int, dict[str, Any]]:
    """Width of the vectors, and how images are prepared, as `ResolvedModel.preprocess`. Loads no weights.

    Raises:
        ModelError: timm has no such model (with the nearest names), or it gives no vector of an RGB image.
    """
    if name.startswith(PREFIX):
        _check_name(name)
    try:
        with quiet():
            tower: Any = without_weights(lambda: create(name))
    except Exception as error:  # a config that timm cannot read
        raise ModelError(f"model.name: {name}: timm cannot build it: {error!r}") from error
    config = data_config(tower.trunk)
    if config["input_size"][0] != 3:
        raise ModelError(f"model.name: {name} takes images of {config['input_size'][0]} channels, expected 3")
    vector = trial(tower, tower.image_size)
    if not isinstance(vector, torch.Tensor) or vector.ndim != 2:
        raise ModelError(f"model.name: {name} gives no vector for an image; take another model")
    return vector.shape[1], preprocess_of_config(config)


def data_config(trunk: torch.nn.Module) -> dict[str, Any]:
    """How timm prepares images for a network of its own."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(trunk)  # type: ignore[attr-defined]
    return config


def preprocess_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """timm's data config in the words of open_clip's; `scale_to` is where the two differ."""
    _, *size = config["input_size"]
    mode = RESIZE_MODES[config["crop_mode"]]
    return {
        "size": size,
        "mode": "RGB",
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "resize_mode": mode,
        "fill_color": [round(255 * value) for value in config["mean"]] if mode == "longest" else 0,
        "scale_to": [math.floor(side / config["crop_pct"]) for side in size],
    }


def own_checkpoint(name: str) -> str:
    """The path of the weights that `timm/NAME` or `hf-hub:…` itself brings, downloaded unless they are there.

    Raises:
        ModelError: there are none, or they could not be downloaded.
    """
    if name.startswith(PREFIX):
        plain = name.removeprefix(PREFIX)
        config: Any = get_pretrained_cfg(get_deprecated_models().get(plain) or plain) or PretrainedCfg()
        repo, file = config.hf_hub_id, config.hf_hub_filename or BIN
        if not repo:
            raise ModelError(f"model.pretrained: the hub has no weights for {name}; {_offer(name, config.url)}")
    else:
        repo, file = name.partition(":")[2], BIN
    return downloaded(name, lambda: _from_hub(repo, file))


def _from_hub(repo: str, file: str) -> str:
    """As timm itself does, safetensors where there are any."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, _, revision = repo.partition("@")
    try:
        return hf_hub_download(repo, file.replace(BIN, "model.safetensors"), revision=revision or None)
    except EntryNotFoundError:
        return hf_hub_download(repo, file, revision=revision or None)


def best_weights(folder: Path) -> str:
    """The path of the weights in a folder that timm takes first. Raises ModelError: there are none."""
    order = {"model.safetensors": 0, BIN: 1}
    return str(min(folder_weights(folder), key=lambda path: (order.get(path.name, 2), path.suffix != ".safetensors")))


def _offer(name: str, url: str | None) -> str:
    if url:
        return f"they are at {url}: give that as `pretrained`, or a checkpoint's path"
    tags = list_pretrained(f"{name.removeprefix(PREFIX).partition('.')[0]}.*")[:8]
    tagged = f"; it has weights as {', '.join(PREFIX + tag for tag in tags)}" if tags else ""
    return f"name a checkpoint's path, or `random` with a `seed`{tagged}"


def _check_name(name: str) -> None:
    """Raises ModelError: timm has no such model."""
    plain = name.removeprefix(PREFIX)
    known = is_model(plain)
    with contextlib.suppress(RuntimeError):  # of a wrong tag
        get_pretrained_cfg(plain)
        if known:
            return
    candidates = list_pretrained(f"{plain.partition('.')[0]}.*") if known else list_models()
    close = difflib.get_close_matches(plain, candidates, n=3, cutoff=0.5)
    nearest = ", ".join(PREFIX + other for other in close) or "none"
    raise ModelError(f"model.name: timm has no model {plain!r}; nearest: {nearest}")
