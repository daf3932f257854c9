"""Finding a model and its weights, and knowing both by their hash.

Runs in the driver, which starts Ray meanwhile: torch and open_clip, seconds to import, are asked only for what their
package data does not tell (tags and downloads).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clipray.errors import ModelError
from clipray.job import Model
from clipray.models.geometry import pair
from clipray.models.weights import checkpoint_path, downloaded, folder_sha256, sha256
from clipray.storage.folder import absolute

DEMO = Path(__file__).parent.parent / "demo" / "model"
DEMO_MODELS = ("demo", "demo-rn")
WITH_WEIGHTS = ("hf-hub:", "local-dir:", "hf:")  # names that bring their own weights
CONFIGS = {"open_clip": "open_clip_config.json", "timm": "config.json", "transformers": "config.json"}
"""Library -> the file in a model's folder that says what the model is."""
CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".ckpt")
# open_clip's defaults for its transform; what a network really has is compared when it is loaded.
PREPROCESS = {
    "size": (224, 224), "mode": "RGB", "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
}  # fmt: skip


Library = Literal["open_clip", "timm", "transformers"]


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is known to exist, with the identity of its weights.

    Attributes:
        name: what its library calls it (with its schema, if any).
        pretrained: a tag, a local checkpoint, or None where the name brings its own weights or they are random.
        config: path of an open_clip config file to register first, or None.
        weights: `sha256:…` of the checkpoint, or `random:SEED`.
        embed_dim: width of the image vector.
        preprocess: open_clip's settings of its own transform (size in px, mean, std, interpolation, …); those of other
            libraries in the same words, with `scale_to`, the size in px to which an image is scaled before it is
            cropped to `size`, and transformers' `crop_offset: floor`, its own rounding.
        library: which makes the network.
        has_text: whether it encodes texts, too.
    """

    name: str
    pretrained: str | None
    config: str | None
    seed: int | None
    weights: str
    embed_dim: int
    preprocess: dict[str, Any]
    library: Library = "open_clip"
    has_text: bool = True

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
    if spec.name.startswith("timm/"):
        return _timm(spec)
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
        return downloaded(f"{name} {pretrained!r}", lambda: open_clip.download_pretrained(config))
    path = checkpoint_path(pretrained)
    if path is None:
        close = difflib.get_close_matches(pretrained, tags, n=1)
        hint = f"; did you mean the tag {close[0]!r}?" if close else ""
        raise ModelError(f"model.pretrained: {pretrained!r} is no tag of {name} and no file{hint}; {offer}")
    return path


def _with_own_weights(spec: Model) -> ResolvedModel:
    """A model of the hub or of a folder, where its config lies beside its weights."""
    if spec.pretrained:
        raise ModelError(f"model.pretrained: {spec.name} brings its own weights; drop `pretrained`")
    schema, _, place = spec.name.partition(":")
    if schema == "hf":
        return _transformers(place)
    if schema == "hf-hub":
        return _of_hub(spec.name, place)
    folder = Path(place).expanduser().resolve()
    library = next((lib for lib, config in CONFIGS.items() if (folder / config).is_file()), None)
    if library is None:
        expected = "a folder with open_clip_config.json or timm's config.json, and weights"
        raise ModelError(f"model.name: {folder}: expected {expected}")
    if library == "open_clip":
        shape = _hub_shape(folder / CONFIGS["open_clip"])
        return ResolvedModel(f"local-dir:{folder}", None, None, None, folder_sha256(folder, CONFIGS[library]), *shape)
    _check_timm_config(folder / CONFIGS["timm"])
    return _of_timm(f"local-dir:{folder}", folder_sha256(folder, CONFIGS["timm"]))


def _of_hub(name: str, repo: str) -> ResolvedModel:
    """A model of the hub in open_clip's layout, or in timm's."""
    from huggingface_hub import hf_hub_download

    try:
        config = Path(downloaded(name, lambda: hf_hub_download(repo, CONFIGS["open_clip"])))
    except ModelError as error:
        try:
            config = Path(downloaded(name, lambda: hf_hub_download(repo, CONFIGS["timm"])))
        except ModelError:
            raise error from None
        _check_timm_config(config)
        from clipray.models.timm_models import own_checkpoint

        return _of_timm(name, sha256(own_checkpoint(name)))
    shape = _hub_shape(config)
    checkpoint = downloaded(name, lambda: _open_clip().download_pretrained_from_hf(repo))
    return ResolvedModel(name, None, None, None, sha256(checkpoint), *shape)


def _hub_shape(config: Path) -> tuple[int, dict[str, Any]]:
    """Vector width and preprocessing by open_clip's config of a folder or of the hub."""
    try:
        values = json.loads(config.read_text())
        return _shape(values["model_cfg"], values.get("preprocess_cfg"))
    except (ValueError, KeyError, TypeError) as error:
        reason = f"not an open_clip config with model_cfg.embed_dim: {error!r}"
        raise ModelError(f"model.name: {config}: {reason}") from error


def _timm(spec: Model) -> ResolvedModel:
    """A model by its name in timm, with timm's own weights, a checkpoint's, or random ones."""
    if spec.pretrained == "random":
        return _of_timm(spec.name, f"random:{spec.seed}", seed=spec.seed)
    if spec.pretrained:
        path = checkpoint_path(spec.pretrained)
        if path is None:
            expected = "`true` for timm's own weights, a checkpoint's path, or `random` with a `seed`"
            raise ModelError(f"model.pretrained: {spec.pretrained!r} is no file; expected {expected}")
        return _of_timm(spec.name, sha256(path), path)
    shapes = _of_timm(spec.name, "")  # a name that is wrong has no weights to wait for
    from clipray.models.timm_models import own_checkpoint

    return replace(shapes, weights=sha256(own_checkpoint(spec.name)))


def _of_timm(name: str, weights: str, checkpoint: str | None = None, seed: int | None = None) -> ResolvedModel:
    from clipray.models.timm_models import describe

    return ResolvedModel(name, checkpoint, None, seed, weights, *describe(name), library="timm", has_text=False)


def _check_timm_config(config: Path) -> None:
    """Raises ModelError: the file is of another library."""
    try:
        values = json.loads(config.read_text())
        if "architecture" in values:
            return
    except (ValueError, TypeError) as error:
        raise ModelError(f"model.name: {config}: not a config of timm: {error!r}") from error
    hint = f"; for transformers write `hf:{config.parent}`" if "model_type" in values else ""
    raise ModelError(f"model.name: {config}: not a config of timm: it has no `architecture`{hint}")


def _transformers(place: str) -> ResolvedModel:
    """A model of transformers, of the hub or of a folder."""
    from clipray.models.hf_models import describe, folder_of

    folder = folder_of(f"hf:{place}")
    described = describe(folder)
    name = f"hf:{folder}" if Path(place).expanduser().is_dir() else f"hf:{place}"
    weights = folder_sha256(folder, CONFIGS["transformers"])
    return ResolvedModel(
        name, None, None, None, weights, described.embed_dim, described.preprocess,
        library="transformers", has_text=described.has_text,
    )  # fmt: skip


def provenance(model: ResolvedModel) -> dict[str, Any]:
    """The model and the versions that made a table, for its metadata."""
    package = "open_clip_torch" if model.library == "open_clip" else model.library
    packages = {"torch": "torch", model.library: package}
    return {
        "model": {**asdict(model), "config": Path(model.config).name if model.config else None},
        "versions": {name: importlib.metadata.version(package) for name, package in packages.items()},
    }
