"""timm's models: its own pixels and vectors, from checkpoints, folders and the hub's cache; and refusals that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from clipray.errors import ModelError
from clipray.job import Feature, Model
from clipray.models.image_encoder import ImageEncoder, mean_and_std
from clipray.models.layers import layer_shapes, tower_without_weights
from clipray.models.load import load
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import ResolvedModel, architecture, resolve
from clipray.models.timm_models import preprocess_of_config
from clipray.models.tokenizer import tokenizer_of
from tools.try_models import try_name

NAME = "test_vit"
SIZES = [(50, 77), (300, 201), (64, 64), (33, 210), (225, 224), (97, 96)]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tensors(model: ResolvedModel, images: list[Image.Image]) -> list[torch.Tensor]:
    """Images as the encoder prepares them."""
    mean, std = mean_and_std(model)
    pixels = [torch.tensor(preprocess_of(model)(image)).permute(2, 0, 1).float().div_(255) for image in images]
    return [x.sub_(mean).div_(std) for x in pixels]


def refusal(**settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(Model(**settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    """A network of timm with a classifier of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return timm.create_model(NAME, num_classes=37).eval()


def vectors_of(model: ResolvedModel, images: list[Image.Image]) -> np.ndarray:
    pixels = np.stack([preprocess_of(model)(image) for image in images])
    return ImageEncoder(model, precision="fp32", batch_size=4, normalize=False).encode(pixels).vectors["clip"]


def upstream(network: Any, images: list[Image.Image]) -> np.ndarray:
    """timm's own way, as its documentation shows it."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    with torch.inference_mode():
        features = network.forward_features(torch.stack([transform(image) for image in images]))
        return network.forward_head(features, pre_logits=True).numpy()


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "size"),
    [
        ("center", 0.875, (64, 64)), ("center", 0.95, (96, 64)), ("center", 1.0, (63, 63)), ("squash", 0.9, (64, 80)),
        ("border", 1.0, (65, 80)), ("border", 0.9, (64, 64)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_those_of_timms_own_transform(
    crop_mode: str, crop_pct: float, size: tuple[int, int], interpolation: str
) -> None:
    config = timm.data.resolve_data_config(
        pretrained_cfg={
            "input_size": (3, *size), "crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation,
        }
    )  # fmt: skip
    transform = timm.data.create_transform(**config, is_training=False)
    model = ResolvedModel("timm/any", None, None, 0, "", 1, preprocess_of_config(config), "timm", has_text=False)
    images = [picture(*side) for side in SIZES]
    for image, ours in zip(images, tensors(model, images), strict=True):
        assert torch.equal(ours, transform(image)), image.size


def test_a_checkpoints_vectors_are_timms_own(classifier: torch.nn.Module, tmp_path: Path) -> None:
    images = [picture(120, 180), picture(200, 190)]
    expected = upstream(classifier, images)
    save_file(classifier.state_dict(), tmp_path / "plain.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in classifier.state_dict().items()}}, tmp_path / "ddp.pth")
    for file in ("plain.safetensors", "ddp.pth"):
        model = resolve(Model(name=f"timm/{NAME}", pretrained=str(tmp_path / file)))
        assert (model.embed_dim, model.has_text, model.image_size) == (64, False, (160, 160))
        assert np.abs(vectors_of(model, images) - expected).max() <= 1e-5


def test_a_norm_that_belongs_to_the_classifier_goes_with_it(tmp_path: Path) -> None:
    network = timm.create_model("levit_128s", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "levit.safetensors")
    model = resolve(Model(name="timm/levit_128s", pretrained=str(tmp_path / "levit.safetensors")))
    assert np.abs(vectors_of(model, [picture(99, 120)]) - upstream(network, [picture(99, 120)])).max() <= 1e-5


def test_a_folder_and_the_hubs_cache_bring_their_own_weights(
    classifier: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(120, 180)]
    expected = upstream(classifier, images)
    save_for_hf(
        classifier, tmp_path / "saved", model_config={"model_args": {"num_classes": 37}}, safe_serialization=True
    )
    local = resolve(Model(name=f"local-dir:{tmp_path / 'saved'}"))
    assert local.library == "timm"
    assert np.abs(vectors_of(local, images) - expected).max() <= 1e-5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for repo in (f"timm--{NAME}.r160_in1k", "somebody--mine"):
        cached = tmp_path / "hub" / f"models--{repo}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("0" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("0" * 40)).symlink_to(tmp_path / "saved")
    for name in (f"timm/{NAME}", f"timm/{NAME}.r160_in1k", "hf-hub:somebody/mine"):
        model = resolve(Model(name=name, pretrained=None if name.startswith("hf") else "true"))
        assert np.abs(vectors_of(model, images) - expected).max() <= 1e-5
    assert model.weights != local.weights  # which is of the folder, its config included
    weights = tmp_path / "saved" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in classifier.state_dict().items()}, weights)
    for changed in (model, local):
        with pytest.raises(ModelError, match="this machine's weights are not those that the run started with"):
            load(changed)


def test_random_weights_are_those_of_the_seed() -> None:
    first, again, other = (
        load(resolve(Model(name=f"timm/{NAME}", pretrained="random", seed=seed))).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["trunk.patch_embed.proj.weight"], other["trunk.patch_embed.proj.weight"])


def test_layers_are_the_trunks_modules() -> None:
    model = architecture(f"timm/{NAME}")
    shapes = layer_shapes(tower_without_weights(model), model.image_size)
    assert shapes["blocks.0"] == (64, 10, 10)
    assert shapes["output"] == (64,)
    model = resolve(Model(name=f"timm/{NAME}", pretrained="random", seed=1))
    features = {"last": Feature(layer="blocks.5", pooling="spoc", l2_before=False), "clip": Feature()}
    encoder = ImageEncoder(model, features=features, precision="fp32", batch_size=4, normalize=False)
    image = picture(160, 160)
    vectors = encoder.encode(preprocess_of(model)(image)[None].copy()).vectors
    trunk = load(model).trunk
    with torch.inference_mode():
        maps = trunk.forward_intermediates(tensors(model, [image])[0][None], indices=[5], intermediates_only=True)
    assert np.abs(vectors["last"] - maps[0].mean((2, 3)).numpy()).max() <= 1e-5
    assert np.abs(vectors["clip"] - upstream(trunk, [image])).max() <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "timm/vit_smal_patch14_dinov2"}, "timm has no model 'vit_smal_patch14_dinov2'; nearest: timm/vit_small_patch14_dinov2,"),
        ({"name": "timm/test_vit.r160"}, "timm has no model 'test_vit.r160'; nearest: timm/test_vit.r160_in1k"),
        ({"name": "timm/xyzzy"}, "timm has no model 'xyzzy'; nearest: none"),
        ({"name": "timm/test_vit", "pretrained": "imagenet"}, "'imagenet' is no file; expected `true` for timm's own weights"),
        ({"name": "timm/legacy_seresnet18"}, "the hub has no weights for timm/legacy_seresnet18; they are at https://"),
        ({"name": "timm/resnet10t_v"}, "timm has no model 'resnet10t_v'; nearest: timm/resnet10t"),
    ],
)  # fmt: skip
def test_refusals(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings)


def test_weights_that_need_a_network_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("timm/test_vit", "hf-hub:timm/test_vit.r160_in1k", "hf-hub:timm/no-such-model-of-these-tests"):
        assert "are not on this machine and could not be downloaded (" in refusal(name=name)


def test_a_checkpoint_of_another_network_is_refused(classifier: torch.nn.Module, tmp_path: Path) -> None:
    weights = {k: v for k, v in classifier.state_dict().items() if k != "norm.weight"}
    save_file(weights, tmp_path / "incomplete.safetensors")
    for name in (NAME, "test_resnet"):
        model = resolve(Model(name=f"timm/{name}", pretrained=str(tmp_path / "incomplete.safetensors")))
        with pytest.raises(ModelError, match=r"its weights could not be loaded from .*Missing key") as caught:
            load(model)
        assert "\n" not in str(caught.value)


def test_a_folder_of_transformers_is_told_from_one_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert f"it has no `architecture`; for transformers write `hf:{tmp_path}`" in refusal(name=f"local-dir:{tmp_path}")


def test_the_tool_that_tries_names() -> None:
    assert try_name("timm/test_vit") == "| `timm/test_vit` | 64 numbers of 160 x 160 px | no text tower |"
    assert try_name("timm/tset_vit").startswith(
        "| `timm/tset_vit` | not loaded: model.name: timm has no model 'tset_vit'"
    )


def test_a_vision_model_encodes_no_texts() -> None:
    with pytest.raises(ModelError, match="timm/test_vit is a vision model, without a text tower"):
        tokenizer_of(architecture("timm/test_vit"))
