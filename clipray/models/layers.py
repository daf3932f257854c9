"""Taps on an image tower: maps from between its layers, all from one forward pass.

`output`, of every network, is the vector (b, d) that the tower itself returns; every other layer is a map (b, c, h, w):

- ViT (open_clip's own): `conv1`, the patch embedding before class token and positions; `block.N`, the patch tokens after
  transformer block N, from 0; `tokens`, those after the last norm, unless the network norms only what it has pooled.
- ResNet (open_clip's ModifiedResNet): `conv1`, the first convolution, raw; `stem`, three convolutions with norms and
  activations, before the average pooling; `layer1` … `layer4`, the stages.
- timm (in open_clip, or a network of its own): any module by its path in the trunk (`blocks.3`, `stages.1`). A 4-d output is taken as (b, c, h, w), or (b, h, w, c)
  where the trunk says so (`output_fmt`: the swin family) and the module is no convolution, unless only the other layout
  has the image's aspect (inside a ConvNeXt block). Tokens (b, n, d) form the patch grid, without the trunk's prefix
  tokens where they have them; where it does not fit (stages that halve), a grid of the image's aspect.
- Any other network, such as those of transformers: nothing but `output`.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from clipray.errors import ModelError, one_line
from clipray.models import timm_models
from clipray.models.dry_run import trial, without_weights
from clipray.models.hf_models import network_without_weights
from clipray.models.resolve import ResolvedModel
from clipray.models.timm_models import TimmTower
from clipray.models.weights import quiet

TINY_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
"""open_clip makes no image tower alone."""
TIMM = (TimmModel, TimmTower)
"""Towers with one of timm's networks as their `trunk`."""


class _Enough(Exception):
    """The last wanted map is there."""


class Taps(torch.nn.Module):
    """An image tower that returns layers of its choice from one forward pass, which ends at the last of them.

    open_clip's ViT also takes other sizes: its positions are resized, once per patch grid, as in `resize_pos_embed`. Hooks
    are on the tower only during a forward pass, so copies and conversions are safe; one thread at a time may run it.

    Args:
        tower: what `image_tower` returns.
        layers: names as above; `available` lists them.

    Raises:
        ModelError: no such layer; in a forward pass, one that gives no map.
    """

    def __init__(self, tower: torch.nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.tower, self.layers = tower, tuple(dict.fromkeys(layers))
        self._where, visual = visual_of(tower)
        paths = _paths(visual)
        if unknown := [layer for layer in self.layers if layer not in paths and layer != "output"]:
            raise ModelError(_unknown(unknown[0], _kind(visual), available(tower)))
        self._paths = {layer: paths[layer] for layer in self.layers if layer != "output"}
        self._positions: dict[tuple[Any, ...], torch.Tensor] = {}

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """(b, 3, height, width), normalised -> by layer (b, c, h, w), or (b, d) for `output`, in the tower's dtype."""
        visual: Any = self.tower.get_submodule(self._where)
        outputs: dict[str, torch.Tensor] = {}

        def keep(layer: str, module: Any, output: Any) -> None:
            taken = _as_map(visual, module, output, batch.shape)
            if taken is None:
                raise ModelError(f"layer {layer!r} of this {_kind(visual)} gives no map")
            # timm's activations and sums work in place on what the module before them returned
            outputs.setdefault(layer, taken.clone() if isinstance(visual, TIMM) else taken)
            if len(outputs) == len(self.layers):
                raise _Enough

        with contextlib.suppress(_Enough), _listening(visual, self._paths, keep):
            output = self._run(visual, batch)
            if "output" in self.layers:
                outputs["output"] = output[0] if isinstance(output, tuple) else output  # CoCa's visual adds its tokens
        if missing := [layer for layer in self.layers if layer not in outputs]:
            raise ModelError(f"layer {missing[0]!r} takes no part in the forward pass of this {_kind(visual)}")
        return {layer: outputs[layer] for layer in self.layers}

    def covered_px(self, input_shape: torch.Size) -> tuple[int, int]:
        """(height, width) in px of the part of an image (…, height, width) that maps show: whole patches."""
        visual: Any = self.tower.get_submodule(self._where)
        patch = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", visual), "patch_size", (1, 1))
        return input_shape[-2] // patch[0] * patch[0], input_shape[-1] // patch[1] * patch[1]

    def _run(self, visual: Any, batch: torch.Tensor) -> Any:
        grid = _grid(visual, batch.shape)
        if not isinstance(visual, VisionTransformer) or grid == visual.grid_size or self.layers == ("conv1",):
            return self.tower(batch)
        positions = visual.positional_embedding.detach()  # (1 + h * w, d)
        key = (grid, positions.dtype, positions.device)
        if key not in self._positions:
            cells = positions[1:].float().reshape(1, *visual.grid_size, -1).permute(0, 3, 1, 2)  # (1, d, h, w)
            cells = torch.nn.functional.interpolate(cells, size=grid, mode="bicubic", antialias=True)
            self._positions[key] = torch.cat([positions[:1], cells.flatten(2)[0].T.to(positions.dtype)])
        name = f"{self._where}.positional_embedding".lstrip(".")
        return torch.func.functional_call(self.tower, {name: self._positions[key]}, (batch,))


def available(tower: torch.nn.Module) -> list[str]:
    """Layers in the order of the forward pass; of a timm trunk, the maps of its upper two levels, though any may be tapped."""
    visual = visual_of(tower)[1]
    if not isinstance(visual, TIMM):
        return [*_paths(visual), "output"]
    input_shape, cell_counts = torch.Size((1, 3, *visual.image_size)), dict[str, int]()

    def note(name: str, module: Any, output: Any) -> None:
        if (taken := _as_map(visual, module, output, input_shape)) is not None:
            cell_counts[name] = taken[0, 0].numel()

    upper = {name: path for name, path in _paths(visual).items() if name.count(".") < 2}
    with _listening(visual, {n: path for n, path in upper.items() if visual.get_submodule(path).state_dict()}, note):
        trial(tower, visual.image_size)
    return [*(name for name, cells in cell_counts.items() if cells > 1), "output"]


def layer_shapes(
    tower: torch.nn.Module, image_size: tuple[int, int], layers: Sequence[str] | None = None
) -> dict[str, tuple[int, ...]]:
    """(channels, height, width) of layers (None: all available), (d,) of `output`, for images of (height, width) px."""
    taps = Taps(tower, available(tower) if layers is None else layers)
    return {layer: tuple(output.shape[1:]) for layer, output in trial(taps, image_size).items()}


def tower_without_weights(model: ResolvedModel) -> torch.nn.Module:
    """The image tower, for the functions above, on torch's `meta` device; if it does not run there, random on the CPU."""
    if model.library == "timm":
        with quiet():
            return without_weights(lambda: timm_models.create(model.name))
    if model.library == "transformers":
        return network_without_weights(model.name, model.image_size)
    if model.config:  # a file, which gives the model its name
        open_clip.add_model_config(model.config)
    with quiet():
        config = open_clip.get_model_config(model.name)
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}

    def build() -> torch.nn.Module:
        clip = open_clip.CustomTextCLIP(config["embed_dim"], vision, TINY_TEXT, config.get("quick_gelu", False))
        tower: torch.nn.Module = clip.visual
        return tower

    return without_weights(build, model.image_size)


def visual_of(tower: torch.nn.Module) -> tuple[str, Any]:
    """Path and module of open_clip's visual network in a tower; a foreign tower is its own, with nothing but `output`."""
    kinds = (VisionTransformer, ModifiedResNet, *TIMM)
    return next(((path, module) for path, module in tower.named_modules() if isinstance(module, kinds)), ("", tower))


def _kind(visual: Any) -> str:
    if isinstance(visual, TIMM):
        return f"timm {type(visual.trunk).__name__}"
    return {VisionTransformer: "ViT", ModifiedResNet: "ResNet"}.get(type(visual), type(visual).__name__)


def _paths(visual: Any) -> dict[str, str]:
    """Layer -> path of the module that returns it."""
    if isinstance(visual, TIMM):
        return {name: f"trunk.{name}" for name, _ in visual.trunk.named_modules() if name}
    if isinstance(visual, ModifiedResNet):
        return {"conv1": "conv1", "stem": "act3", **{f"layer{n}": f"layer{n}" for n in range(1, 5)}}
    if not isinstance(visual, VisionTransformer):
        return {}
    blocks = {f"block.{n}": f"transformer.resblocks.{n}" for n in range(len(visual.transformer.resblocks))}
    pooled_first = visual.final_ln_after_pool if visual.attn_pool is None else visual.attn_pool_contrastive is None
    return {"conv1": "conv1", **blocks, **({} if pooled_first else {"tokens": "ln_post"})}


def _unknown(layer: str, architecture: str, known: list[str]) -> str:
    """`no layer 'block.12' in this ViT; it has conv1, block.0..11, tokens, output`; a wrong word gets the nearest one."""
    misnumbered = layer.rstrip("0123456789") in {name.rstrip("0123456789") for name in known}
    close = [] if misnumbered else difflib.get_close_matches(layer, known, n=1)
    listed = re.sub(r"(?<!\S)(\S*?)(\d+)(?:, \1\d+)*, \1(\d+)(?=,)", r"\1\2..\3", ", ".join(known))
    return (
        f"no layer {layer!r} in this {architecture}{''.join(f'; nearest: {name}' for name in close)}; it has {listed}"
    )


def refusal(tower: torch.nn.Module, layers: Sequence[str], image_size: tuple[int, int]) -> str | None:
    """Why layers cannot be had of images of (height, width) px, in one line: one gives no map, or refuses the size.

    None where they can. A size twice as wide as the model's own tells whether any size will do.

    Raises:
        ModelError: no such layer.
    """
    taps, visual = Taps(tower, layers), visual_of(tower)[1]
    try:
        trial(taps, image_size)
    except ModelError as error:
        return str(error)
    except Exception as error:  # networks refuse by assertions and by operations that do not fit
        cause = one_line(error, 200) or type(error).__name__
        if isinstance(visual, ModifiedResNet) and "output" in taps.layers:
            cause = f"`output` is pooled with positions for {visual.image_size // 32} x {visual.image_size // 32} cells"
        return f"this {_kind(visual)} cannot take images of {image_size[0]} x {image_size[1]} px (h x w): {cause}"
    return None


@contextlib.contextmanager
def _listening(network: Any, paths: dict[str, str], heard: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Call `heard(name, module, output)` whenever the module at a name's path returns in this thread; no hook stays."""
    this_thread = threading.get_ident()

    def hear(name: str, module: Any, output: Any) -> None:
        if threading.get_ident() == this_thread:
            heard(name, module, output)

    with contextlib.ExitStack() as hooks:
        for name, path in paths.items():
            hook = network.get_submodule(path).register_forward_hook(
                lambda mod, _in, out, name=name: hear(name, mod, out)
            )
            hooks.enter_context(hook)
        yield


def _grid(visual: Any, input_shape: torch.Size) -> tuple[int, int] | None:
    """(height, width) in patches of an image (…, height, width) px; None for a network without patches."""
    if isinstance(visual, VisionTransformer):
        return input_shape[-2] // visual.patch_size[0], input_shape[-1] // visual.patch_size[1]
    size = getattr(getattr(getattr(visual, "trunk", None), "patch_embed", None), "dynamic_feat_size", None)
    return size(tuple(input_shape[-2:])) if size else None


def _as_map(visual: Any, module: Any, value: Any, input_shape: torch.Size) -> torch.Tensor | None:
    """A module's output as (b, c, h, w); None where it is no map of images (b, 3, height, width)."""
    if not isinstance(value, torch.Tensor) or value.ndim not in {3, 4} or value.shape[0] != input_shape[0]:
        return None
    trunk, (height, width) = getattr(visual, "trunk", visual), input_shape[-2:]
    if value.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "") == "NHWC" and not isinstance(module, torch.nn.Conv2d)
        layouts = [value, value.permute(0, 3, 1, 2)][:: -1 if channels_last else 1]
        # of the image's aspect, but for a row or column of rounding
        return next((x for x in layouts if abs(x.shape[2] * width - x.shape[3] * height) < height + width), None)
    prefix = 1 if isinstance(visual, VisionTransformer) else getattr(trunk, "num_prefix_tokens", 0)
    grid, counts = _grid(visual, input_shape), [n for n in (value.shape[1] - prefix, value.shape[1]) if n > 0]
    if grid is None or math.prod(grid) not in counts:
        grids = [(r, n // r) for n in counts for r in [max(1, round((n * height / width) ** 0.5))] if n % r == 0]
        grid = next(((r, c) for r, c in grids if abs(r * width - c * height) < max(height, width)), None)
    return value[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid) if grid else None
