"""Finding an open_clip model and its weights, and knowing both by their hash.

Runs in the driver, which starts Ray meanwhile: torch and open_clip, seconds to import, are asked only for what their
package data does not tell (tags and downloads).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from clipray.errors import ModelError, one_line
from clipray.job import Model
from clipray.models.geometry import pair
from clipray.storage.folder import absolute
from clipray.storage.uris import is_local

DEMO = Path(__file__).parent.parent / "demo" / "model"
DEMO_MODELS = ("demo", "demo-rn")
WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # names that bring their own weights
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt")
# open_clip's defaults for its transform; what a network really has is compared when it is loaded.
PREPROCESS = {
    "size": (224, 224), "mode": "RGB", "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is known to exist, with the identity of its weights.

    Attributes:
        name: what open_clip calls it (with its schema, if any).
        pretrained: a tag, a local checkpoint, or None where the name brings its own weights or they are random.
        config: path of an open_clip config file to register first, or None.
        weights: `sha256:…` of the checkpoint, or `random:SEED`.
        embed_dim: width of the image vector.
        preprocess: open_clip's settings of its own transform (size in px, mean, std, interpolation, …).
    """

    name: str
    pretrained: str | None
    config: str | None
    seed: int | None
    weights: str
    embed_dim: int
    preprocess: dict[str, Any]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in px of the network's input."""
        return pair(self.preprocess["size"])

    def identity(self) -> dict[str, Any]:
        """What decides the vectors, wherever the files lie."""
        name = Path(self.config).stem if self.config else self.name.split(":/")[0]
        return {"name": name, "weights": self.weights, "preprocess": self.preprocess}


def resolve(spec: Model) -> ResolvedModel:
    """Find the model and its weights (downloading them if the name or tag says so) and hash them.

    Raises:
        ModelError: unknown name or tag (with the nearest known one), no weights named, or weights that cannot be had.
    """
    if spec.name.startswith(WITH_WEIGHTS):
        return _with_own_weights(spec)
    name, config, pretrained = spec.name, None, spec.pretrained
    if name in DEMO_MODELS:
        config, pretrained = str(DEMO / f"{name}.json"), pretrained or str(DEMO / f"{name}.safetensors")
    elif name.endswith(".json"):
        config = os.path.abspath(name)
    if config and not os.path.isfile(config):
        raise ModelError(f"model.name: {name}: no such open_clip config file")
    if config:
        known, name = _read_config(config), Path(config).stem
    else:
        known = _builtin_config(name)
    if pretrained == "random":
        return ResolvedModel(name, None, config, spec.seed, f"random:{spec.seed}", *_shape(known))
    if pretrained and pretrained.endswith(CHECKPOINT_SUFFIXES) and os.path.isfile(absolute(pretrained)):
        path = absolute(pretrained)
        return ResolvedModel(name, path, config, None, sha256(path), *_shape(known))
    if config:
        _open_clip().add_model_config(config)
    checkpoint = _checkpoint(name, pretrained)
    tag = _open_clip().get_pretrained_cfg(name, str(pretrained))
    return ResolvedModel(name, pretrained if tag else checkpoint, config, None, sha256(checkpoint), *_shape(known, tag))


def architecture(name: str) -> ResolvedModel:
    """A model for its shapes alone: no weights are asked for, and none are loaded where a name brings its own.

    Raises:
        ModelError: unknown name.
    """
    if name.startswith(WITH_WEIGHTS):
        return resolve(Model(name=name))
    return resolve(Model(name=name, pretrained="random", seed=0))


def _open_clip() -> Any:
    import open_clip

    return open_clip


def _builtin_config(name: str) -> dict[str, Any]:
    """The config of a model that open_clip brings, from its package data."""
    package = importlib.util.find_spec("open_clip")
    folder = Path(str(package.origin if package else "")).parent / "model_configs"
    path = folder / f"{name}.json"
    if os.sep not in name and path.is_file():
        return dict(json.loads(path.read_text()))
    close = difflib.get_close_matches(name, [p.stem for p in folder.glob("*.json")], n=3, cutoff=0.5)
    raise ModelError(f"model.name: open_clip has no model {name!r}; nearest: {', '.join(close) or 'none'}")


def _shape(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Vector width and preprocessing, merged as open_clip merges them: its defaults, the weights' own, the network's size."""
    settings = {key: value for key, value in (preprocess or {}).items() if key in PREPROCESS and value is not None}
    merged: dict[str, Any] = {**PREPROCESS, **settings}
    merged["size"] = list(pair(config.get("vision_cfg", {}).get("image_size", 224)))
    return int(config["embed_dim"]), {key: list(v) if isinstance(v, tuple) else v for key, v in merged.items()}


def _read_config(config: str) -> dict[str, Any]:
    """An open_clip config file, which open_clip itself would skip without a word when it is broken."""
    try:
        values = json.loads(Path(config).read_text())
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in values]
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"model.name: {config}: not an open_clip config: {error}") from error
    if missing or not isinstance(values, dict):
        raise ModelError(f"model.name: {config}: not an open_clip config: it has no {' and no '.join(missing)}")
    return values


def _checkpoint(name: str, pretrained: str | None) -> str:
    open_clip = _open_clip()
    tags = open_clip.list_pretrained_tags_by_model(name)
    offer = f"tags: {', '.join(tags[:8])}{' …' if len(tags) > 8 else ''}" if tags else "it has no tags"
    if pretrained is None:
        raise ModelError(
            f"model.pretrained is missing for {name}: name a tag, a checkpoint path, or `random` with a `seed`; {offer}"
        )
    if pretrained in tags:
        config = open_clip.get_pretrained_cfg(name, pretrained)
        return _downloaded(f"{name} {pretrained!r}", lambda: open_clip.download_pretrained(config))
    if not is_local(pretrained):
        cache = os.path.expanduser("~/.cache/clipray")
        return _downloaded(
            pretrained, lambda: fsspec.open_local(f"filecache::{pretrained}", filecache={"cache_storage": cache})
        )
    path = absolute(pretrained)
    if not os.path.isfile(path):
        close = difflib.get_close_matches(pretrained, tags, n=1)
        hint = f"; did you mean the tag {close[0]!r}?" if close else ""
        raise ModelError(f"model.pretrained: {pretrained!r} is no tag of {name} and no file{hint}; {offer}")
    return path


def _downloaded(what: str, download: Callable[[], Any]) -> str:
    try:
        with quiet():
            path = download()
    except Exception as error:  # hubs and filesystems each have their own
        reason = one_line(error) or type(error).__name__
        raise ModelError(
            f"the weights of {what} are not on this machine and could not be downloaded ({reason}); give a checkpoint's path instead"
        ) from error
    return str(path)


def _with_own_weights(spec: Model) -> ResolvedModel:
    """A model of the hub or of a folder, where its config lies beside its weights."""
    if spec.pretrained:
        raise ModelError(f"model.pretrained: {spec.name} brings its own weights; drop `pretrained`")
    hub, place = spec.name.startswith("hf-hub:"), spec.name.partition(":")[2]
    folder = Path(place).expanduser().resolve()
    config = folder / "open_clip_config.json"
    if hub:
        from huggingface_hub import hf_hub_download

        config = Path(_downloaded(spec.name, lambda: hf_hub_download(place, config.name)))
    if not config.is_file():
        raise ModelError(f"model.name: {folder}: expected a folder with open_clip_config.json and weights")
    try:
        values = json.loads(config.read_text())
        shape = _shape(values["model_cfg"], values.get("preprocess_cfg"))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not an open_clip config with model_cfg.embed_dim: {error!r}"
        raise ModelError(f"model.name: {config}: {reason}") from error
    if not hub:
        return ResolvedModel(f"local-dir:{folder}", None, None, None, folder_sha256(folder), *shape)
    checkpoint = _downloaded(spec.name, lambda: _open_clip().download_pretrained_from_hf(place))
    return ResolvedModel(spec.name, None, None, None, sha256(checkpoint), *shape)


def folder_sha256(folder: Path) -> str:
    """Of the config and all weights in a model's folder."""
    weights = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth"))
    if not weights:
        raise ModelError(f"model.name: {folder}: no weights (*.safetensors, *.bin, *.pth) beside the config")
    parts = [sha256(str(p)) for p in [folder / "open_clip_config.json", *weights]]
    return "sha256:" + hashlib.sha256("".join(parts).encode()).hexdigest()


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs on the root logger and warns of what `resolve` has checked already; the hub retries for a minute."""
    from huggingface_hub import constants

    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub")}
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_answers(constants.ENDPOINT)
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@functools.cache
def _hub_answers(endpoint: str) -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
        return True
    except OSError:
        return False


def provenance(model: ResolvedModel) -> dict[str, Any]:
    """The model and the versions that made a table, for its metadata."""
    return {
        "model": {**asdict(model), "config": Path(model.config).name if model.config else None},
        "versions": {
            "torch": importlib.metadata.version("torch"),
            "open_clip": importlib.metadata.version("open_clip_torch"),
        },
    }
