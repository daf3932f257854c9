"""Models: the same vectors as open_clip's own code, for every kind of tower; and refusals that say what to do."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import ToTensor

from clipray.errors import ModelError
from clipray.job import Model
from clipray.models import encoder as encoders
from clipray.models.image_encoder import ImageEncoder, mean_and_std, sample_image
from clipray.models.load import load
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import PREPROCESS, ResolvedModel, _builtin_config, resolve
from clipray.pipelines.decode import decode
from clipray.pipelines.spec import Limits
from clipray.tables.reasons import Rejected

PHOTOS = Path(__file__).parents[3].parent / "shared" / "data" / "photos"
KINDS = ("vit", "resnet", "timm")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Real photos of many sizes; they are no part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip(f"real photos are not there: {PHOTOS}")
    return [Image.open(path) for path in sorted(PHOTOS.iterdir())[::10][:24]]


def local(folder: Path, **options: Any) -> Model:
    return Model(name=f"local-dir:{folder}", **options)


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def config_of(folder: Path, path: Path, **changes: Any) -> Path:
    """The model of `folder` as an open_clip config file at `path`."""
    values = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    path.write_text(json.dumps({**values, **changes}))
    return path


def encoder(folder: Path, **options: Any) -> ImageEncoder:
    return ImageEncoder(resolve(local(folder)), **{"precision": "fp32", "batch_size": 8, **options})


def upstream(folder: Path, images: Sequence[Image.Image]) -> np.ndarray:
    """open_clip's own way, as its README shows it; raw image features."""
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    with torch.inference_mode():
        batch = torch.stack([preprocess(image.convert("RGB")) for image in images])
        return network.encode_image(batch).numpy()


def ours(encoder: ImageEncoder, images: Sequence[Image.Image]) -> np.ndarray:
    pixels = np.stack([preprocess_of(encoder.model)(image.convert("RGB")) for image in images])
    return encoder.encode(pixels).vectors["clip"]


# --- the same as open_clip


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_open_clips(saved_models: dict[str, Path], photos: list[Image.Image], kind: str) -> None:
    expected = upstream(saved_models[kind], photos)
    found = ours(encoder(saved_models[kind], normalize=False), photos)
    assert found.dtype == np.float32
    assert found.shape == (24, 32)
    assert np.abs(found - expected).max() <= 1e-5
    assert np.abs(expected).max() > 0.01  # a network that says something
    unit = ours(encoder(saved_models[kind]), photos)
    assert np.abs(unit - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_points_the_same_way(saved_models: dict[str, Path], photos: list[Image.Image], kind: str) -> None:
    expected = upstream(saved_models[kind], photos)
    found = ours(encoder(saved_models[kind], precision="bf16", normalize=False), photos)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.sum(found * expected, axis=1) / norms
    assert cosines.min() >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_open_clips(saved_models: dict[str, Path], photos: list[Image.Image], kind: str) -> None:
    model = resolve(local(saved_models[kind]))
    to_pixels, (mean, std) = preprocess_of(model), mean_and_std(model)
    *steps, to_tensor, normalize = image_transform_v2(PreprocessCfg(**model.preprocess), is_train=False).transforms
    assert isinstance(to_tensor, ToTensor)
    assert mean.flatten().tolist() == pytest.approx(normalize.mean)
    assert std.flatten().tolist() == pytest.approx(normalize.std)
    _, _, whole = open_clip.create_model_and_transforms(f"local-dir:{saved_models[kind]}")
    for photo in photos:
        image = photo.convert("RGB")
        pixels = to_pixels(image)
        assert (pixels.dtype, pixels.shape) == (np.uint8, (64, 64, 3))
        before = image
        for step in steps:
            before = step(before)
        assert np.array_equal(pixels, (to_tensor(before).permute(1, 2, 0) * 255).round().numpy().astype(np.uint8))
        unnormalized = (whole(image) * std + mean).permute(1, 2, 0) * 255
        assert np.abs(unnormalized.numpy() - pixels).max() < 1e-2  # open_clip's own, its last step undone


@pytest.mark.parametrize(("kind", "height", "width"), [("vit", 1, 65_000), ("vit", 65_000, 1), ("timm", 70_000, 2)])
def test_an_image_that_would_be_scaled_to_too_many_pixels_is_refused(
    saved_models: dict[str, Path], kind: str, height: int, width: int
) -> None:
    """`vit` scales the short side, `timm` squashes: there the image in between is large."""
    to_pixels = preprocess_of(resolve(local(saved_models[kind])), 4_000_000)
    scaled = {1: (64, 4_160_000), 65_000: (4_160_000, 64), 70_000: (64, 64)}[height]
    with pytest.raises(Rejected) as refused:
        to_pixels(Image.new("RGB", (width, height)))
    assert refused.value.reason == "too_many_pixels"
    assert f"{height} x {width} px" in refused.value.message
    assert f"{scaled[0]} x {scaled[1]} px" in refused.value.message
    assert "max_pixels=4000000" in refused.value.message
    assert to_pixels(Image.new("RGB", (900, 1))).shape == (64, 64, 3)


def test_an_image_that_keeps_its_aspect_is_bounded_likewise(saved_models: dict[str, Path]) -> None:
    to_pixels = preprocess_of(resolve(local(saved_models["vit"])), 1_000_000, keep_aspect=(64, 16))
    assert to_pixels(Image.new("RGB", (1, 60_000)), 60_000, 1).shape == (64, 16, 3)
    with pytest.raises(Rejected, match=r"70000 x 1 px.*64 x 16 px"):  # 70,000 x 16 px in between
        to_pixels(Image.new("RGB", (1, 70_000)), 70_000, 1)


def test_photos_through_our_decoder_are_the_same(saved_models: dict[str, Path], photos: list[Image.Image]) -> None:
    mine = encoder(saved_models["vit"])
    decoded = [decode(Path(photo.filename).read_bytes(), Limits()) for photo in photos]
    assert np.array_equal(ours(mine, decoded), ours(mine, photos))


def test_the_ways_of_preparing_a_picture_differ(saved_models: dict[str, Path]) -> None:
    """The three models of these tests resize, crop and normalise differently, so that a default would be seen."""
    wide = Image.fromarray(sample_image(90, 200))
    found = {kind: resolve(local(saved_models[kind])) for kind in KINDS}
    pixels = {kind: preprocess_of(model)(wide) for kind, model in found.items()}
    assert len({p.tobytes() for p in pixels.values()}) == 3
    assert mean_and_std(found["resnet"])[0].flatten().tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_and_a_checkpoint(saved_models: dict[str, Path], tmp_path: Path, kind: str, suffix: str) -> None:
    config = config_of(saved_models[kind], tmp_path / f"small-{kind}.json")
    weights = saved_models[kind] / "open_clip_model.safetensors"
    checkpoint = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save(load_file(weights), checkpoint)
    else:
        shutil.copy(weights, checkpoint)
    model = resolve(Model(name=str(config), pretrained=str(checkpoint)))
    assert model.embed_dim == 32
    assert model.image_size == (64, 64)
    assert model.identity()["name"] == f"small-{kind}"
    assert str(tmp_path) not in json.dumps(model.identity())
    found = ImageEncoder(model, precision="fp32", batch_size=4, normalize=False).encode(pictures(5)).vectors["clip"]
    # the same network; only the folder's config says another mean and std, which this one does not
    network = open_clip.create_model(f"local-dir:{saved_models[kind]}").eval()
    mean, std = (torch.tensor(model.preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        batch = torch.from_numpy(pictures(5)).permute(0, 3, 1, 2) / 255
        expected = network.encode_image((batch - mean) / std).numpy()
    assert np.abs(found - expected).max() <= 1e-5


def test_the_size_of_batches_does_not_matter(saved_models: dict[str, Path]) -> None:
    whole = encoder(saved_models["vit"], batch_size=64).encode(pictures(13)).vectors["clip"]
    parts = encoder(saved_models["vit"], batch_size=5).encode(pictures(13)).vectors["clip"]
    assert whole.shape == (13, 32)
    assert np.abs(whole - parts).max() <= 1e-6


def test_the_fastest_batch_is_one_of_those_tried(saved_models: dict[str, Path]) -> None:
    found = encoder(saved_models["vit"], batch_size="auto")
    assert found.batch_size in (16, 32, 64, 128, 256)
    assert found.facts["batch_size"] == found.batch_size


def test_a_record_of_what_it_is(saved_models: dict[str, Path]) -> None:
    assert encoder(saved_models["vit"]).facts == {
        "device": "cpu",
        "precision": "fp32",
        "self_check_cosine": 1.0,
        "batch_size": 8,
    }
    facts = encoder(saved_models["vit"], precision="bf16").facts
    assert facts["precision"] == "bf16"
    assert 0.999 <= facts["self_check_cosine"] <= 1


# --- random weights


def test_random_weights_are_those_of_their_seed(saved_models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(saved_models["resnet"], tmp_path / "small-random.json")

    def vectors(seed: int) -> np.ndarray:
        model = resolve(Model(name=str(config), pretrained="random", seed=seed))
        assert model.weights == f"random:{seed}"
        return ImageEncoder(model, precision="fp32", batch_size=2).encode(pictures(2)).vectors["clip"]

    first = vectors(1)
    torch.manual_seed(99)  # whatever the process drew before
    assert np.array_equal(vectors(1), first)
    assert np.abs(vectors(2) - first).max() > 1e-3


def test_random_weights_of_a_built_in_name() -> None:
    model = resolve(Model(name="ViT-B-32", pretrained="random", seed=4))
    assert (model.embed_dim, model.image_size, model.weights) == (512, (224, 224), "random:4")
    assert model.identity()["name"] == "ViT-B-32"


def test_loading_draws_nothing_from_the_process(saved_models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(saved_models["resnet"], tmp_path / "small-random.json")
    models = [
        resolve(Model(name=str(config), pretrained="random", seed=1)),
        resolve(local(saved_models["vit"])),
        resolve(local(saved_models["timm"])),
    ]
    for model in models:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        load(model)
        after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]


# --- refusals


def refusal(**spec: Any) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(Model(**spec))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_name_without_weights_is_refused_with_its_tags() -> None:
    message = refusal(name="ViT-B-32")
    assert message.startswith("model.pretrained is missing for ViT-B-32: name a tag, a checkpoint path, or `random`")
    assert "tags: openai, laion400m_e31, laion400m_e32" in message


def test_a_name_without_tags_says_so(saved_models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(saved_models["vit"], tmp_path / "mine.json")
    assert refusal(name=str(config)).endswith("it has no tags")


@pytest.mark.parametrize(("name", "nearest"), [("ViT-B-23", "ViT-B-32"), ("RN5O", "RN50"), ("vit-l-14", "ViT-L-14")])
def test_a_wrong_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    message = refusal(name=name, pretrained="openai")
    assert message.startswith(f"model.name: open_clip has no model {name!r}; nearest: ")
    assert nearest in message.split("nearest: ")[1].split(", ")


def test_what_open_clip_says_is_what_its_package_data_says() -> None:
    """The driver reads the package data, so that it need not import torch."""
    shipped = {p.stem for p in (Path(open_clip.__file__).parent / "model_configs").glob("*.json")}
    for name in shipped & set(open_clip.list_models()):
        assert _builtin_config(name) == open_clip.get_model_config(name)
    assert asdict(PreprocessCfg()) | {"size": (224, 224)} == PREPROCESS


def test_a_driver_needs_no_torch() -> None:
    code = (
        "import sys; from clipray.models.resolve import resolve; from clipray.job import Model\n"
        "import clipray.cli, clipray.steps.base.encode_run, clipray.engine.stream\n"
        "resolve(Model(name='ViT-B-32', pretrained='random', seed=0)); resolve(Model(name='demo'))\n"
        "print([n for n in ('torch', 'open_clip', 'sklearn', 'faiss') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_wrong_tag_gets_the_nearest_one() -> None:
    message = refusal(name="ViT-B-32", pretrained="opnai")
    assert "'opnai' is no tag of ViT-B-32 and no file; did you mean the tag 'openai'?" in message
    assert "no tag of RN50 and no file; tags: openai" in refusal(name="RN50", pretrained="/no/such/file.pt")


def test_weights_that_need_a_network_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # nothing is downloaded there
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for spec in (
        {"name": "RN50", "pretrained": "openai"},
        {"name": "hf-hub:nobody/no-such-model-of-these-tests"},
        {"name": "RN50", "pretrained": "http://127.0.0.1:9/weights.pt"},
    ):
        message = refusal(**spec)
        assert "are not on this machine and could not be downloaded (" in message
        assert message.endswith("give a checkpoint's path instead")


def test_a_hub_name_brings_its_own_weights(saved_models: dict[str, Path]) -> None:
    assert "brings its own weights; drop `pretrained`" in refusal(name="hf-hub:a/b", pretrained="openai")
    assert "brings its own weights; drop `pretrained`" in refusal(
        name=f"local-dir:{saved_models['vit']}", pretrained="openai"
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected a folder with open_clip_config.json or timm's config.json, and weights"),
        ({"open_clip_config.json": "{"}, "not an open_clip config with model_cfg.embed_dim"),
        ({"open_clip_config.json": "{}"}, "not an open_clip config with model_cfg.embed_dim"),
        ({"open_clip_config.json": '{"model_cfg": {"embed_dim": 8}}'}, "no weights (*.safetensors, *.bin, *.pth)"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert message in refusal(name=f"local-dir:{tmp_path}")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"embed_dim": 8}'])
def test_a_file_that_is_no_config(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "broken-config.json"
    if text is not None:
        path.write_text(text)
    message = refusal(name=str(path), pretrained="random", seed=1)
    assert message.startswith("model.name: ")
    assert str(path) in message


def test_weights_of_another_architecture(saved_models: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(saved_models["vit"], tmp_path / "wider.json", embed_dim=48)
    model = resolve(Model(name=str(config), pretrained=str(saved_models["vit"] / "open_clip_model.safetensors")))
    with pytest.raises(ModelError, match=r"wider: its weights could not be loaded from .*size mismatch") as caught:
        load(model)
    assert "\n" not in str(caught.value)
    model = resolve(Model(name=str(config), pretrained=str(config)))  # a file that holds no weights
    with pytest.raises(ModelError, match="its weights could not be loaded") as caught:
        load(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["folder", "checkpoint"])
def test_weights_that_change_after_the_start(saved_models: dict[str, Path], tmp_path: Path, how: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_models["vit"], folder)
    weights = folder / "open_clip_model.safetensors"
    model = resolve(local(folder))
    if how == "checkpoint":
        config = config_of(folder, tmp_path / "mine.json")
        model = resolve(Model(name=str(config), pretrained=str(weights)))
    load(model)
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match="this machine's weights are not those that the run started with"):
        load(model)
    weights.unlink()
    with pytest.raises(ModelError):
        load(model)


def test_the_identity_is_of_the_weights_not_of_their_place(saved_models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(saved_models["vit"], tmp_path / "copy")
    here, there = resolve(local(saved_models["vit"])), resolve(local(tmp_path / "copy"))
    assert here.identity() == there.identity()
    assert here.identity() != resolve(local(saved_models["resnet"])).identity()
    config = tmp_path / "copy/open_clip_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "preprocess_cfg": {"mean": [0, 0, 0]}}))
    assert resolve(local(tmp_path / "copy")).identity() != here.identity()


def test_a_network_that_prepares_pictures_otherwise_is_refused(saved_models: dict[str, Path]) -> None:
    model = resolve(local(saved_models["vit"]))
    changed = ResolvedModel(**{**vars(model), "preprocess": {**model.preprocess, "interpolation": "nearest"}})
    with pytest.raises(ModelError, match="expected preprocessing"):
        load(changed)


# --- precision and memory


def test_a_precision_that_fails_its_check(saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MIN_COSINE", 1.1)
    with pytest.raises(
        ModelError,
        match=r"precision bf16: cosine to fp32 on the test image is \d.\d+ for 'clip', expected >= 1.1; use `precision: fp32`",
    ):
        encoder(saved_models["vit"], precision="bf16")
    monkeypatch.setattr(encoders, "native_precision", lambda device: "bf16")
    fallen = encoder(saved_models["vit"], precision="auto")
    assert (fallen.precision, fallen.facts["precision"]) == ("fp32", "fp32")
    assert next(fallen.network.parameters()).dtype == torch.float32
    assert np.array_equal(
        fallen.encode(pictures(3)).vectors["clip"], encoder(saved_models["vit"]).encode(pictures(3)).vectors["clip"]
    )


def test_auto_takes_the_native_precision(saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for native in ("bf16", "fp32"):
        monkeypatch.setattr(encoders, "native_precision", lambda device, native=native: native)
        assert encoder(saved_models["vit"], precision="auto").precision == native


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_f": True}, "fp32"), ({}, "fp32")],
)
def test_the_native_precision_of_a_cpu(monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert encoders.native_precision("cpu") == expected


def _memory_for(encoder: ImageEncoder, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on batches above `rows` run out of memory. Returns the sizes that were tried."""
    real, tried = encoder._forward, []

    def forward(network: Any, pixels: np.ndarray, precision: str, boxes: Any) -> Any:
        tried.append(len(pixels))
        if len(pixels) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(network, pixels, precision, boxes)

    monkeypatch.setattr(encoder, "_forward", forward)
    return tried


def test_out_of_memory_halves_the_batch_and_goes_on(
    saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder(saved_models["vit"]).encode(pictures(21)).vectors["clip"]
    small = encoder(saved_models["vit"], batch_size=16)
    tried = _memory_for(small, 5, monkeypatch)
    found = small.encode(pictures(21)).vectors["clip"]
    assert np.abs(found - expected).max() <= 1e-6
    assert tried == [16, 8, 4, 4, 4, 4, 4, 1]
    assert small.batch_size == small.facts["batch_size"] == 4
    assert np.abs(small.encode(pictures(21)).vectors["clip"] - expected).max() <= 1e-6
    assert 16 not in tried[8:]  # halved for good


def test_out_of_memory_with_a_single_picture_is_an_error(
    saved_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = encoder(saved_models["vit"], batch_size=4)
    tried = _memory_for(small, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        small.encode(pictures(4)).vectors["clip"]
    assert tried == [4, 2, 1]


def test_the_test_picture_shows_something() -> None:
    for height, width in ((64, 64), (224, 224), (32, 96)):
        picture = sample_image(height, width)
        assert (picture.shape, picture.dtype) == ((height, width, 3), np.uint8)
        assert all(len(np.unique(picture[..., c])) > 1 for c in range(3))
    assert np.array_equal(sample_image(64, 64), sample_image(64, 64))


def test_a_network_of_another_make_is_kept_whole() -> None:
    encoder = ImageEncoder(
        resolve(Model(name="coca_ViT-B-32", pretrained="random", seed=1)),
        precision="fp32",
        batch_size=2,
        normalize=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network, _, preprocess = open_clip.create_model_and_transforms("coca_ViT-B-32")
    network.eval()
    pixels = sample_image(*encoder.image_size)
    with torch.inference_mode():
        expected = network.encode_image(preprocess(Image.fromarray(pixels))[None], normalize=False)[0].numpy()
    assert np.abs(encoder.encode(pixels[None]).vectors["clip"][0] - expected).max() <= 1e-5
