"""Taps: each layer is what a forward pass by hand gives, for every kind of tower; nothing stays behind on the tower."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from timm.models.swin_transformer import SwinTransformer

from clipray.errors import ModelError
from clipray.job import Model
from clipray.models import layers
from clipray.models.image_encoder import image_tower
from clipray.models.layers import (
    Taps,
    available,
    layer_shapes,
    refusal,
    tower_without_weights,
)
from clipray.models.load import load
from clipray.models.resolve import resolve

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 3, "width": 48, "patch_size": 16, "head_width": 16}
COCA = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
RESNET = {"image_size": 64, "layers": [2, 1, 1, 1], "width": 16, "head_width": 32}
TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
SIZES = {"vit": (64, 64), "resnet": (64, 64), "timm_vit": (160, 160), "convnext": (64, 64), "swin": (64, 64)}


def make(vision: dict[str, Any], seed: int = 1) -> Any:
    """An open_clip visual tower with random weights, norms included (a fresh one's are ones and zeros)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        visual = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT).visual
        for parameter in visual.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return visual.eval().requires_grad_(False)


def make_timm(name: str, size: int, seed: int = 1) -> Any:
    return make({**TIMM, "timm_model_name": name, "image_size": size}, seed)


def make_swin() -> Any:
    tower = make_timm("test_convnext", 64)
    torch.manual_seed(1)
    tower.trunk = SwinTransformer(
        img_size=64, window_size=4, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 2), num_classes=0
    ).eval()
    tower.head = torch.nn.Linear(64, 32)
    return tower.requires_grad_(False)


MAKE: dict[str, Callable[[], Any]] = {
    "vit": lambda: make(VIT),
    "resnet": lambda: make(RESNET),
    "timm_vit": lambda: make_timm("test_vit", 160),
    "convnext": lambda: make_timm("test_convnext", 64),
    "swin": make_swin,
}


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    return {kind: build() for kind, build in MAKE.items()}


def wide(size: tuple[int, int]) -> tuple[int, int]:
    return size[0], 2 * size[1]


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def hooks(tower: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in tower.modules())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for layer, value in expected.items():
        assert found[layer].shape == value.shape, layer
        assert torch.equal(found[layer], value), layer


# --- each layer, by hand


def vit_by_hand(visual: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = {"conv1": visual.conv1(batch)}
    height, width = maps["conv1"].shape[2:]

    def as_map(x: torch.Tensor) -> torch.Tensor:
        return x[:, 1:].reshape(len(x), height, width, -1).permute(0, 3, 1, 2)

    x = maps["conv1"].flatten(2).permute(0, 2, 1)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    for number, block in enumerate(visual.transformer.resblocks):
        x = block(x)
        maps[f"block.{number}"] = as_map(x)
    x = visual.ln_post(x)
    return {**maps, "tokens": as_map(x), "output": x[:, 0] @ visual.proj}


def resnet_by_hand(visual: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = {"conv1": visual.conv1(batch)}
    x = visual.bn1(maps["conv1"]).relu()
    x = visual.bn2(visual.conv2(x)).relu()
    maps["stem"] = x = visual.bn3(visual.conv3(x)).relu()
    x = visual.avgpool(x)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        maps[name] = x = visual.get_submodule(name)(x)
    return {**maps, "output": visual.attnpool(x)}


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_vit_layers_by_hand(size: tuple[int, int]) -> None:
    visual, batch = make({**VIT, "image_size": size}), pictures(*size)
    expected = vit_by_hand(visual, batch)
    assert expected["block.1"].shape == (2, 48, size[0] // 16, size[1] // 16)
    assert available(visual) == list(expected) == ["conv1", "block.0", "block.1", "block.2", "tokens", "output"]
    assert_same(Taps(visual, list(expected))(batch), expected)
    blocks = visual.forward_intermediates(batch, intermediates_only=True)["image_intermediates"]  # open_clip's own
    assert_same(Taps(visual, ["block.2", "block.0"])(batch), {"block.2": blocks[2], "block.0": blocks[0]})


def test_resnet_layers_by_hand(towers: dict[str, Any]) -> None:
    batch = pictures(64, 64)
    expected = resnet_by_hand(towers["resnet"], batch)
    assert expected["conv1"].min() < 0 <= expected["stem"].min()
    assert available(towers["resnet"]) == list(expected)
    assert_same(Taps(towers["resnet"], list(expected))(batch), expected)


def test_timm_vit_layers_by_hand(towers: dict[str, Any]) -> None:
    trunk, batch = towers["timm_vit"].trunk, pictures(160, 160)
    blocks = trunk.forward_intermediates(batch, norm=False, intermediates_only=True)  # without the class token
    tokens = trunk.forward_features(batch)
    assert trunk.num_prefix_tokens == 1
    expected = {
        "patch_embed.proj": trunk.patch_embed.proj(batch),
        "patch_embed": trunk.patch_embed.proj(batch),  # as tokens, before the class token
        **{f"blocks.{number}": blocks[number] for number in range(6)},
        "blocks": blocks[5],
        "norm": tokens[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2),
        "output": towers["timm_vit"](batch),
    }
    assert available(towers["timm_vit"]) == list(expected)
    assert_same(Taps(towers["timm_vit"], list(expected))(batch), expected)


def test_timm_conv_layers_by_hand(towers: dict[str, Any]) -> None:
    trunk, batch = towers["convnext"].trunk, pictures(64, 64)
    expected = {"stem.0": trunk.stem[0](batch), "stem.1": trunk.stem(batch), "stem": trunk.stem(batch)}
    x = expected["stem"]
    for number, stage in enumerate(trunk.stages):
        expected[f"stages.{number}"] = x = stage(x)
    expected |= {"stages": x, "output": towers["convnext"](batch)}
    assert available(towers["convnext"]) == list(expected)
    assert_same(Taps(towers["convnext"], list(expected))(batch), expected)


def test_channels_last_inside_a_channels_first_network(towers: dict[str, Any]) -> None:
    block, batch = towers["convnext"].trunk.stages[0].blocks[0], pictures(64, 128)
    x = block.norm(block.conv_dw(towers["convnext"].trunk.stem(batch)).permute(0, 2, 3, 1))
    expected = block.mlp(x)  # (b, h, w, c)
    assert expected.shape[1] < expected.shape[2]
    found = Taps(towers["convnext"], ["stages.0.blocks.0.mlp"])(batch)
    assert_same(found, {"stages.0.blocks.0.mlp": expected.permute(0, 3, 1, 2)})


def test_a_channels_last_network(towers: dict[str, Any]) -> None:
    trunk, batch = towers["swin"].trunk, pictures(64, 64)
    stages = trunk.forward_intermediates(batch, norm=False, intermediates_only=True)  # channels first
    expected = {"patch_embed.proj": trunk.patch_embed.proj(batch)}
    expected |= {f"layers.{number}": stages[number] for number in range(3)}
    # as many channels as cells a side: only the network's word tells which is which
    assert stages[0].shape == (2, 16, 16, 16)
    assert_same(Taps(towers["swin"], list(expected))(batch), expected)


def test_tokens_that_are_no_patches() -> None:
    """PVT halves its tokens at every stage and has no grid of its own; a query token is a single cell."""
    tower = make_timm("test_convnext", 64)
    tower.trunk = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 8, 8), torch.nn.Flatten(2), torch.nn.Linear(8 * 12, 4 * 6), torch.nn.Linear(24, 7)
    )
    shape = torch.Size((2, 3, 64, 96))

    def as_map(tokens: int) -> tuple[int, ...] | None:
        found = layers._as_map(tower, tower.trunk, torch.zeros(2, tokens, 5), shape)
        return None if found is None else tuple(found.shape[1:])

    assert [as_map(n) for n in (24, 96, 6)] == [(5, 4, 6), (5, 8, 12), (5, 2, 3)]
    assert [as_map(n) for n in (25, 7, 0)] == [None, None, None]
    assert layers._as_map(tower, tower.trunk, torch.zeros(8, 24, 5), shape) is None  # windows of pictures
    assert layers._as_map(tower, tower.trunk, torch.zeros(2, 5), shape) is None
    assert layers._as_map(tower, tower.trunk, (torch.zeros(2, 24, 5),), shape) is None
    shape = torch.Size((2, 3, 64, 64))
    assert [as_map(n) for n in (16, 1, 12, 6)] == [(5, 4, 4), (5, 1, 1), None, None]


def test_what_timm_changes_in_place_is_tapped_before() -> None:
    tower, batch = make_timm("test_resnet", 64), pictures(64, 64)
    trunk = tower.trunk
    assert trunk.act1.inplace
    expected = {"bn1": trunk.bn1(trunk.conv1(batch)), "layer1": None, "output": tower(batch)}
    assert expected["bn1"].min() < 0
    expected["layer1"] = trunk.layer1(trunk.maxpool(expected["bn1"].relu()))
    assert_same(Taps(tower, list(expected))(batch), expected)


@pytest.mark.parametrize("kind", MAKE)
def test_the_native_output_is_the_towers_own(towers: dict[str, Any], kind: str) -> None:
    tower, batch = towers[kind], pictures(*SIZES[kind])
    expected = tower(batch)
    everything = Taps(tower, available(tower))(batch)
    assert torch.equal(everything["output"], expected)
    assert torch.equal(Taps(tower, ["output"])(batch)["output"], expected)
    for layer in available(tower):  # alone or together
        assert torch.equal(Taps(tower, [layer])(batch)[layer], everything[layer])
    assert torch.equal(tower(batch), expected)


def test_coca_whole_and_its_visual() -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": COCA,
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    }
    with torch.random.fork_rng():
        network = open_clip.CoCa(**config).eval().requires_grad_(False)
    tower, batch = image_tower(network), pictures(64, 64)
    assert tower is not network.visual
    expected = network.encode_image(batch, normalize=False)
    wanted = ["block.1", "output"]
    assert torch.equal(Taps(tower, wanted)(batch)["output"], expected)
    assert_same(Taps(network.visual, wanted)(batch), Taps(tower, wanted)(batch))
    wide = pictures(64, 112)
    assert_same(Taps(network.visual, wanted)(wide), Taps(tower, wanted)(wide))
    assert "tokens" not in available(tower)  # its last norm sees the pooler's queries
    assert hooks(tower) == 0


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, True),
        ({"pool_type": "avg"}, True),
        ({"pool_type": "avg", "final_ln_after_pool": True}, False),
        ({"attentional_pool": True, "attn_pooler_heads": 2}, False),
    ],
)
def test_tokens_are_there_where_the_last_norm_sees_them(changes: dict[str, Any], there: bool) -> None:
    visual = make({**VIT, **changes})
    assert ("tokens" in available(visual)) is there
    if there:
        assert layer_shapes(visual, (64, 64), ["tokens"]) == {"tokens": (48, 4, 4)}
    else:
        with pytest.raises(ModelError, match=r"no layer 'tokens' in this ViT; .*it has conv1, block.0..2, output$"):
            Taps(visual, ["tokens"])


def test_a_tower_of_another_make_has_its_output() -> None:
    tower = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    assert available(tower) == ["output"]
    assert layer_shapes(tower, (8, 8)) == {"output": (5,)}
    with pytest.raises(ModelError, match="no layer 'conv1' in this Sequential; it has output"):
        refusal(tower, ["conv1"], (8, 8))


# --- one pass, that ends early


@pytest.fixture
def calls(towers: dict[str, Any]) -> Iterator[dict[str, int]]:
    """How often modules of the towers ran: `vit.conv1`."""
    counts: dict[str, int] = {}
    handles = []
    for kind, tower in towers.items():
        for name, module in tower.named_modules():

            def count(_module: Any, _inputs: Any, key: str = f"{kind}.{name}") -> None:
                counts[key] = counts.get(key, 0) + 1

            handles.append(module.register_forward_pre_hook(count))
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "wanted", "last", "next_one"),
    [
        ("vit", ["conv1"], "conv1", "ln_pre"),
        ("vit", ["block.1", "conv1"], "transformer.resblocks.1", "transformer.resblocks.2"),
        ("vit", ["tokens", "block.0"], "ln_post", ""),
        ("resnet", ["conv1"], "conv1", "bn1"),
        ("resnet", ["stem"], "act3", "avgpool"),
        ("resnet", ["layer4"], "layer4", "attnpool"),
        ("timm_vit", ["blocks.0"], "trunk.blocks.0", "trunk.blocks.1"),
        ("convnext", ["stages.1", "stem"], "trunk.stages.1", "trunk.stages.2"),
    ],
)
def test_the_pass_ends_at_the_last_wanted_layer(
    towers: dict[str, Any], calls: dict[str, int], kind: str, wanted: list[str], last: str, next_one: str
) -> None:
    Taps(towers[kind], wanted)(pictures(*SIZES[kind]))
    assert calls[f"{kind}.{last}"] == 1
    assert not next_one or f"{kind}.{next_one}" not in calls


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm_vit", "convnext"])
def test_all_layers_cost_one_pass(towers: dict[str, Any], calls: dict[str, int], kind: str) -> None:
    towers[kind](pictures(*SIZES[kind]))
    plain = dict(calls)
    calls.clear()
    taps = Taps(towers[kind], MAPS[kind] * 2 + ["output"])
    taps(pictures(*SIZES[kind]))
    assert calls == plain


MAPS = {
    "vit": ["conv1", "block.0", "block.2", "tokens"],
    "resnet": ["conv1", "stem", "layer1", "layer4"],
    "timm_vit": ["patch_embed", "blocks.0", "norm"],
    "convnext": ["stem", "stages.0", "stages.3"],
}


# --- copies, conversions, what stays behind


@pytest.mark.parametrize("kind", MAPS)
def test_copies_and_conversions(kind: str) -> None:
    size, wanted = SIZES[kind], [*MAPS[kind], "output"]
    taps = Taps(MAKE[kind](), wanted)
    with torch.inference_mode():  # as the encoder does, after it ran
        exact = taps(pictures(*size))
        half = copy.deepcopy(taps).to(torch.bfloat16)
        rounded = half(pictures(*size).to(torch.bfloat16))
    assert [value.dtype for value in rounded.values()] == [torch.bfloat16] * len(wanted)
    for layer in wanted:
        cosine = torch.cosine_similarity(exact[layer].flatten(1), rounded[layer].float().flatten(1))
        assert cosine.min() > 0.99, layer
    assert_same(taps(pictures(*size)), exact)  # the original as before
    twin = copy.deepcopy(taps)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert twin(pictures(*size))["output"].norm() < exact["output"].norm() / 2  # its own weights, not the original's
    assert_same(taps(pictures(*size)), exact)


def test_resized_positions_survive_copies_and_conversions(towers: dict[str, Any]) -> None:
    taps, batch = Taps(copy.deepcopy(towers["vit"]), ["block.1", "output"]), pictures(96, 64)
    with torch.inference_mode():
        exact = taps(batch)
        copied = copy.deepcopy(taps)
        assert_same(copied(batch), exact)
        copied.to(torch.bfloat16)  # in place, with positions of fp32 in the cache
        rounded = copied(batch.to(torch.bfloat16))
    assert_same(taps(batch), exact)  # out of inference mode, with positions that were made in it
    taps.to("meta")
    assert taps(batch.to("meta"))["output"].is_meta  # of their device, too
    assert rounded["output"].dtype == torch.bfloat16
    assert torch.cosine_similarity(exact["output"], rounded["output"].float()).min() > 0.99
    assert list(taps.state_dict()) == [f"tower.{name}" for name in towers["vit"].state_dict()]


@pytest.mark.parametrize("kind", MAPS)
def test_no_hook_stays_behind(kind: str) -> None:
    tower = MAKE[kind]()
    parameters = {name: id(parameter) for name, parameter in tower.named_parameters()}
    Taps(tower, MAPS[kind])(pictures(*SIZES[kind]))
    assert hooks(tower) == 0
    Taps(tower, [*MAPS[kind], "output"])(pictures(*SIZES[kind]))
    assert hooks(tower) == 0
    with pytest.raises(RuntimeError):
        Taps(tower, MAPS[kind])(torch.zeros(1, 4, *SIZES[kind]))  # four channels
    assert hooks(tower) == 0
    available(tower)
    assert hooks(tower) == 0
    refusal(tower, [*MAPS[kind], "output"], wide(SIZES[kind]))  # some refuse in the middle
    assert hooks(tower) == 0
    assert {name: id(parameter) for name, parameter in tower.named_parameters()} == parameters


# --- pictures of other sizes


def test_positions_at_another_size_are_open_clips(towers: dict[str, Any]) -> None:
    """The network that open_clip itself makes of the same weights for that size, run plainly."""
    for size in [(96, 128), (32, 64), (64, 48)]:
        network = open_clip.CLIP(embed_dim=32, vision_cfg={**VIT, "image_size": size}, text_cfg=TEXT)
        network.eval().requires_grad_(False)  # with gradients, torch's attention takes another path
        weights = {f"visual.{name}": value for name, value in towers["vit"].state_dict().items()}
        resize_pos_embed(weights, network)
        network.load_state_dict(weights, strict=False)
        batch, wanted = pictures(*size), available(towers["vit"])
        expected = vit_by_hand(network.visual, batch)
        assert torch.equal(expected["output"], network.visual(batch))
        assert_same(Taps(towers["vit"], wanted)(batch), expected)
    assert towers["vit"].positional_embedding.shape == (17, 48)


def test_positions_are_resized_once_per_grid_and_not_when_unused(
    towers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = torch.nn.functional.interpolate

    def interpolate(x: torch.Tensor, **options: Any) -> torch.Tensor:
        made.append(options["size"])
        return real(x, **options)

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    taps = Taps(towers["vit"], ["block.0"])
    for height, width in [(64, 64), (64, 79), (96, 64), (96, 64), (111, 79), (64, 96), (96, 64)]:
        found = taps(pictures(height, width))["block.0"]
        assert found.shape[2:] == (height // 16, width // 16)
    assert made == [(6, 4), (4, 6)]
    assert_same(Taps(towers["vit"], ["conv1"])(pictures(96, 96)), {"conv1": towers["vit"].conv1(pictures(96, 96))})
    assert made == [(6, 4), (4, 6)]


@pytest.mark.parametrize(
    ("kind", "wanted", "reason"),
    [
        ("vit", ["conv1", "block.0", "tokens", "output"], None),
        ("resnet", ["conv1", "stem", "layer4"], None),
        ("resnet", ["stem", "output"], "64 x 128 px .*`output` is pooled with positions for 2 x 2 cells$"),
        ("timm_vit", ["blocks.0", "output"], None),  # timm's own `dynamic_img_size`
        ("convnext", ["stages.0", "output"], None),
        ("swin", ["layers.0"], "^this timm SwinTransformer cannot take images of 64 x 128 px .*128.*64"),
    ],
)
def test_who_takes_other_sizes(towers: dict[str, Any], kind: str, wanted: list[str], reason: str | None) -> None:
    for tower in (towers[kind], copy.deepcopy(towers[kind]).to("meta")):
        found = refusal(tower, wanted, wide(SIZES[kind]))
        if reason is None:
            assert found is None
        else:
            assert found is not None
            assert re.search(reason, found)
            assert "\n" not in found


def test_timm_tokens_of_other_sizes_form_the_patch_grid(towers: dict[str, Any]) -> None:
    batch = pictures(160, 96)
    blocks = towers["timm_vit"].trunk.forward_intermediates(batch, norm=False, intermediates_only=True)
    assert blocks[0].shape[2:] == (10, 6)
    assert_same(
        Taps(towers["timm_vit"], ["blocks.0", "blocks.4"])(batch), {"blocks.0": blocks[0], "blocks.4": blocks[4]}
    )


# --- shapes


def test_shapes(towers: dict[str, Any]) -> None:
    assert layer_shapes(towers["resnet"], (64, 64)) == {
        "conv1": (8, 32, 32), "stem": (16, 32, 32), "layer1": (64, 16, 16), "layer2": (128, 8, 8),
        "layer3": (256, 4, 4), "layer4": (512, 2, 2), "output": (32,),
    }  # fmt: skip
    assert layer_shapes(towers["resnet"], (96, 64), ["layer3"]) == {"layer3": (256, 6, 4)}
    assert layer_shapes(towers["vit"], (64, 96), ["output", "block.1"]) == {"output": (32,), "block.1": (48, 4, 6)}
    half = copy.deepcopy(towers["vit"]).to(torch.bfloat16)
    assert layer_shapes(half, (64, 64)) == layer_shapes(towers["vit"], (64, 64))


def test_shapes_of_well_known_models_without_weights() -> None:
    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        model = resolve(Model(name=name, pretrained="random", seed=1))
        return layer_shapes(tower_without_weights(model), model.image_size)

    vit = shapes("ViT-B-32")
    assert len(vit) == 15
    assert (vit["conv1"], vit["block.11"], vit["tokens"]) == ((768, 7, 7),) * 3
    resnet = shapes("RN50")
    assert resnet["stem"] == (64, 112, 112)
    assert (resnet["layer4"], resnet["output"]) == ((2048, 7, 7), (1024,))
    assert shapes("ViT-B-16-SigLIP")["blocks.11"] == (768, 14, 14)
    assert shapes("convnext_tiny")["stages.1"] == (192, 28, 28)


@pytest.mark.parametrize("how", ["meta", "no meta"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_shapes_without_weights_are_those_with(
    saved_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    if how == "no meta":

        class NoMeta(open_clip.CustomTextCLIP):
            def __init__(self, *arguments: Any) -> None:
                if torch.empty(0).is_meta:
                    raise NotImplementedError("no such operation on meta")
                super().__init__(*arguments)

        monkeypatch.setattr(open_clip, "CustomTextCLIP", NoMeta)
    config = tmp_path / "of-a-file.json"
    config.write_text(json.dumps(json.loads((saved_models[kind] / "open_clip_config.json").read_text())["model_cfg"]))
    model = resolve(Model(name=f"local-dir:{saved_models[kind]}"))
    expected = layer_shapes(image_tower(load(model)), model.image_size)
    state = torch.get_rng_state()
    for resolved in (model, resolve(Model(name=str(config), pretrained="random", seed=1))):
        tower = tower_without_weights(resolved)
        assert {p.device.type for p in tower.parameters()} == {"meta" if how == "meta" else "cpu"}
        assert layer_shapes(tower, resolved.image_size) == expected
    assert torch.equal(torch.get_rng_state(), state)


# --- refusals


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        ("vit", "blok.1", "no layer 'blok.1' in this ViT; nearest: block.1; it has conv1, block.0..2, tokens, output"),
        ("vit", "block.3", "no layer 'block.3' in this ViT; it has conv1, block.0..2, tokens, output"),
        ("vit", "stem", "no layer 'stem' in this ViT; it has conv1, block.0..2, tokens, output"),
        ("resnet", "block.0", "no layer 'block.0' in this ResNet; it has conv1, stem, layer1..4, output"),
        ("resnet", "layer5", "no layer 'layer5' in this ResNet; it has conv1, stem, layer1..4, output"),
        ("resnet", "stam", "no layer 'stam' in this ResNet; nearest: stem; it has conv1, stem, layer1..4, output"),
        ("convnext", "stage.1", "no layer 'stage.1' in this timm ConvNeXt; nearest: stages.1; it has stem.0..1, stem, stages.0..3, stages, output"),
        ("timm_vit", "blocks.6", "no layer 'blocks.6' in this timm VisionTransformer; it has patch_embed.proj, patch_embed, blocks.0..5, blocks, norm, output"),
        ("timm_vit", "", "no layer '' in this timm VisionTransformer; it has patch_embed.proj, patch_embed, blocks.0..5, blocks, norm, output"),
        ("timm_vit", "fc_norm", "layer 'fc_norm' of this timm VisionTransformer gives no map"),
        ("timm_vit", "blocks.0.attn.q_norm", "layer 'blocks.0.attn.q_norm' of this timm VisionTransformer gives no map"),
    ],
)  # fmt: skip
def test_refusals(towers: dict[str, Any], kind: str, wanted: str, message: str) -> None:
    for tower in (towers[kind], copy.deepcopy(towers[kind]).to("meta")):
        try:
            found = refusal(tower, ["output", wanted], SIZES[kind])
        except ModelError as error:  # there is no such layer
            found = str(error)
        assert found == message


@pytest.mark.parametrize("kind", MAKE)
def test_what_is_available_is_not_refused(towers: dict[str, Any], kind: str) -> None:
    for tower in (towers[kind], copy.deepcopy(towers[kind]).to("meta")):
        assert refusal(tower, available(tower), SIZES[kind]) is None
    assert refusal(towers["convnext"], ["stages.0.blocks.0.conv_dw"], (64, 64)) is None  # deeper, but there


def test_a_module_that_never_runs() -> None:
    tower = make_timm("test_convnext", 64)
    tower.trunk.spare = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(ModelError, match="layer 'spare' takes no part in the forward pass of this timm ConvNeXt"):
        Taps(tower, ["spare", "stem"])(pictures(64, 64))
    assert "spare" not in available(tower)
    assert hooks(tower) == 0
