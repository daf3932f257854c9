"""open_clip models: finding one, and loading the same weights everywhere.

`resolve` runs once, in the driver, and turns the job's words into a `ResolvedModel` that every worker loads alike.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
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
import numpy as np
import open_clip
import torch
from huggingface_hub import constants, hf_hub_download
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torchvision.transforms import Normalize, ToTensor

from clipray.errors import ModelError
from clipray.settings import Model

DEMO = Path(__file__).parent.parent / "demo" / "model"
DEMO_MODELS = ("demo", "demo-rn")


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
        return _pair(self.preprocess["size"])

    def identity(self) -> dict[str, Any]:
        """What decides the vectors, wherever the files lie."""
        name = Path(self.config).stem if self.config else self.name.split(":/")[0]
        return {"name": name, "weights": self.weights, "preprocess": self.preprocess}


def resolve(spec: Model) -> ResolvedModel:
    """Find the model and its weights (downloading them if the name or tag says so) and hash them.

    Raises:
        ModelError: unknown name or tag (with the nearest known one), no weights named, or weights that cannot be had.
    """
    if spec.name.startswith("hf-hub:"):
        return _from_hub(spec)
    if spec.name.startswith("local-dir:"):
        return _from_folder(spec)
    name, config, pretrained = spec.name, None, spec.pretrained
    if name in DEMO_MODELS:
        config, pretrained = str(DEMO / f"{name}.json"), pretrained or str(DEMO / f"{name}.safetensors")
    elif name.endswith(".json"):
        config = os.path.abspath(name)
    if config and not os.path.isfile(config):
        raise ModelError(f"model.name: {name}: no such open_clip config file")
    if config:
        name = _register(config)
    known = open_clip.get_model_config(name)
    if known is None:
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        raise ModelError(f"model.name: open_clip has no model {name!r}; nearest: {', '.join(close) or 'none'}")
    if pretrained == "random":
        return ResolvedModel(name, None, config, spec.seed, f"random:{spec.seed}", *_shape(known))
    checkpoint = _checkpoint(name, pretrained)
    tag = open_clip.get_pretrained_cfg(name, str(pretrained))
    return ResolvedModel(
        name, pretrained if tag else checkpoint, config, None, _sha256(checkpoint), *_shape(known, tag)
    )


def _shape(config: dict[str, Any], preprocess: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Vector width and preprocessing, merged as open_clip merges them: its defaults, the weights' own, the network's size."""
    merged = merge_preprocess_dict(asdict(PreprocessCfg()), preprocess or {})
    merged["size"] = list(_pair(config.get("vision_cfg", {}).get("image_size", 224)))
    return int(config["embed_dim"]), {key: list(v) if isinstance(v, tuple) else v for key, v in merged.items()}


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _register(config: str) -> str:
    """Make a config file known to open_clip, which would read a broken one again and again."""
    try:
        values = json.loads(Path(config).read_text())
        missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in values]
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"model.name: {config}: not an open_clip config: {error}") from error
    if missing or not isinstance(values, dict):
        raise ModelError(f"model.name: {config}: not an open_clip config: it has no {' and no '.join(missing)}")
    open_clip.add_model_config(config)
    return Path(config).stem


def _checkpoint(name: str, pretrained: str | None) -> str:
    tags = open_clip.list_pretrained_tags_by_model(name)
    offer = f"tags: {', '.join(tags[:8])}{' …' if len(tags) > 8 else ''}" if tags else "it has no tags"
    if pretrained is None:
        raise ModelError(
            f"model.pretrained is missing for {name}: name a tag, a checkpoint path, or `random` with a `seed`; {offer}"
        )
    if pretrained in tags:
        config = open_clip.get_pretrained_cfg(name, pretrained)
        return _downloaded(f"{name} {pretrained!r}", lambda: open_clip.download_pretrained(config))
    if "://" in pretrained and not pretrained.startswith("file://"):
        cache = os.path.expanduser("~/.cache/clipray")
        return _downloaded(
            pretrained, lambda: fsspec.open_local(f"filecache::{pretrained}", filecache={"cache_storage": cache})
        )
    path = os.path.abspath(os.path.expanduser(pretrained.removeprefix("file://")))
    if not os.path.isfile(path):
        close = difflib.get_close_matches(pretrained, tags, n=1)
        hint = f"; did you mean the tag {close[0]!r}?" if close else ""
        raise ModelError(f"model.pretrained: {pretrained!r} is no tag of {name} and no file{hint}; {offer}")
    return path


def _downloaded(what: str, download: Callable[[], Any]) -> str:
    try:
        with _quiet():
            path = download()
    except Exception as error:  # hubs and filesystems each have their own
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the weights of {what} are not on this machine and could not be downloaded ({reason}); give a checkpoint's path instead"
        ) from error
    return str(path)


def _from_hub(spec: Model) -> ResolvedModel:
    repo = spec.name.removeprefix("hf-hub:")
    if spec.pretrained:
        raise ModelError(f"model.pretrained: {spec.name} brings its own weights; drop `pretrained`")
    config = json.loads(
        Path(_downloaded(spec.name, lambda: hf_hub_download(repo, "open_clip_config.json"))).read_text()
    )
    checkpoint = _downloaded(spec.name, lambda: open_clip.download_pretrained_from_hf(repo))
    return ResolvedModel(
        spec.name, None, None, None, _sha256(checkpoint), *_shape(config["model_cfg"], config.get("preprocess_cfg"))
    )


def _from_folder(spec: Model) -> ResolvedModel:
    folder = Path(spec.name.removeprefix("local-dir:")).expanduser().resolve()
    if spec.pretrained:
        raise ModelError(f"model.pretrained: {spec.name} brings its own weights; drop `pretrained`")
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise ModelError(f"model.name: {folder}: expected a folder with open_clip_config.json and weights")
    try:
        values = json.loads(config.read_text())
        shape = _shape(values["model_cfg"], values.get("preprocess_cfg"))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model.name: {config}: not an open_clip config with model_cfg.embed_dim: {error!r}"
        ) from error
    return ResolvedModel(f"local-dir:{folder}", None, None, None, _folder_sha256(folder), *shape)


def _folder_sha256(folder: Path) -> str:
    """Of the config and all weights in a model's folder."""
    weights = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth"))
    if not weights:
        raise ModelError(f"model.name: {folder}: no weights (*.safetensors, *.bin, *.pth) beside the config")
    parts = [_sha256(str(p)) for p in [folder / "open_clip_config.json", *weights]]
    return "sha256:" + hashlib.sha256("".join(parts).encode()).hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs on the root logger and warns of what `resolve` has checked already; the hub retries for a minute."""
    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub")}
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_answers()
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
def _hub_answers() -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        return True
    except OSError:
        return False


def load(model: ResolvedModel, device: str = "cpu") -> torch.nn.Module:
    """The open_clip model in fp32 and eval mode, its weights verified against `model.weights` where they are a file.

    Raises:
        ModelError: the weights do not fit the architecture, or are others than the driver saw.
    """
    if model.config:
        _register(model.config)
    if model.name.startswith("local-dir:"):
        where, found = model.name, _folder_sha256(Path(model.name.removeprefix("local-dir:")))
    elif model.pretrained and os.path.isfile(model.pretrained):
        where, found = model.pretrained, _sha256(model.pretrained)
    else:
        where, found = model.name, model.weights  # a tag or a hub's name; the download is open_clip's
    if found != model.weights:
        raise ModelError(
            f"{where}: this machine's weights are not those that the run started with ({model.weights[:19]}…)"
        )
    with _quiet(), torch.random.fork_rng(devices=[]):
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


def _check_preprocess(model: ResolvedModel, found: dict[str, Any]) -> None:
    """Pictures are decoded apart from the network: both must mean the same transform."""
    found = {key: list(v) if isinstance(v, tuple) else v for key, v in {**found, "size": _pair(found["size"])}.items()}
    if found != model.preprocess:
        raise ModelError(f"{model.name}: expected preprocessing {model.preprocess}, but the loaded network has {found}")


def split_transform(model: ResolvedModel) -> tuple[Callable[[Image.Image], np.ndarray], torch.Tensor, torch.Tensor]:
    """open_clip's own inference transform in two halves: pixels on the CPU, normalisation on the device.

    Returns:
        (PIL image -> (H, W, 3) uint8, mean (3, 1, 1) float32, std (3, 1, 1) float32)
    """
    transform = image_transform_v2(PreprocessCfg(**model.preprocess), is_train=False)
    normalize = next(t for t in transform.transforms if isinstance(t, Normalize))
    steps = [
        t
        for t in transform.transforms
        if not isinstance(t, (Normalize, ToTensor)) and type(t).__name__ != "MaybeToTensor"
    ]

    def to_pixels(image: Image.Image) -> np.ndarray:
        for step in steps:
            image = step(image)
        return np.asarray(image, dtype=np.uint8)

    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (normalize.mean, normalize.std))
    return to_pixels, mean, std


def provenance(model: ResolvedModel) -> dict[str, Any]:
    """The model and the versions that made a table, for its metadata."""
    return {
        "model": {**asdict(model), "config": Path(model.config).name if model.config else None},
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
