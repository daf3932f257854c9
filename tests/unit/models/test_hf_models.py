"""Models of transformers, of configurations made here: their own pixels, vectors and texts; and refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from clipray.errors import ModelError
from clipray.job import Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.load import load
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve
from clipray.models.text_encoder import TextEncoder

transformers = pytest.importorskip("transformers", reason='transformers is not installed: pip install "clipray[hf]"')
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
WORDS = ["<|startoftext|>", "<|endoftext|>", "a", "red", "blue", "dog", "cat", "</w>"]


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [picture(*size) for size in ((50, 77), (300, 201), (32, 32), (97, 41))]


def vit() -> tuple[Any, Any]:
    config = transformers.ViTConfig(**VISION)
    return transformers.ViTModel(config), transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=2)


def dinov2() -> tuple[Any, Any]:
    config = transformers.Dinov2Config(**VISION)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32})
    return transformers.Dinov2Model(config), processor


def convnext() -> tuple[Any, Any]:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1])
    return transformers.ConvNextModel(config), transformers.ConvNextImageProcessor(size={"shortest_edge": 64})


def clip() -> tuple[Any, Any]:
    text = {**TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(config), processor


def siglip() -> tuple[Any, Any]:
    text = {**TOWER, "vocab_size": len(WORDS), "max_position_embeddings": 6, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return transformers.SiglipModel(config), transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "vit": vit, "dinov2": dinov2, "convnext": convnext, "clip": clip, "siglip": siglip,
}  # fmt: skip


def tokenizer() -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="</w>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single=f"{WORDS[0]} $A {WORDS[1]}", special_tokens=[(WORDS[0], 0), (WORDS[1], 1)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token=WORDS[1], unk_token="</w>")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> folder with a network, its image processor and, of CLIP and SigLIP, a tokenizer."""
    folders = {}
    for kind, make in MAKERS.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            network, processor = make()
        network.save_pretrained(folder)
        processor.save_pretrained(folder)
        if kind in ("clip", "siglip"):
            tokenizer().save_pretrained(folder)
    return folders


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as caught:
        resolve(Model(name=name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def upstream(folder: Path) -> Any:
    """transformers' own way: the vectors of `IMAGES`, by its Pillow image processors."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = transformers.AutoModel.from_pretrained(folder).float().eval()
    with torch.inference_mode():
        pixels = processor(images=IMAGES, return_tensors="pt").pixel_values.float()
        features = getattr(network, "get_image_features", network)(pixel_values=pixels)
    return features.pooler_output.flatten(1).numpy()


@pytest.mark.parametrize("kind", MAKERS)
def test_vectors_and_pixels_are_those_of_transformers(saved: dict[str, Path], kind: str) -> None:
    folder = saved[kind]
    model = resolve(Model(name=f"hf:{folder}"))
    pixels = np.stack([preprocess_of(model)(image) for image in IMAGES])
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    raw = processor(images=IMAGES, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    assert np.array_equal(pixels, raw.transpose(0, 2, 3, 1))
    encoder = ImageEncoder(model, precision="fp32", batch_size=4, normalize=False)
    expected = upstream(folder)
    assert expected.shape == (len(IMAGES), model.embed_dim)
    assert np.abs(encoder.encode(pixels).vectors["clip"] - expected).max() <= 1e-5
    assert model.has_text == (kind in ("clip", "siglip"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_are_encoded_as_transformers_does(saved: dict[str, Path], kind: str) -> None:
    texts = ["a red dog", "a cat", "a red dog a blue cat a red dog"]
    encoder = TextEncoder(resolve(Model(name=f"hf:{saved[kind]}")), precision="fp32", batch_size=2, normalize=False)
    vectors, cut = encoder.encode(texts)
    words = transformers.AutoTokenizer.from_pretrained(saved[kind])
    network = transformers.AutoModel.from_pretrained(saved[kind]).float().eval()
    with torch.inference_mode():
        tokens = words(texts, padding="max_length", truncation=True, max_length=6, return_tensors="pt")
        expected = network.get_text_features(input_ids=tokens.input_ids).pooler_output.numpy()
    assert np.abs(vectors - expected).max() <= 1e-5
    assert cut.tolist() == [False, False, True]
    assert encoder.logit_scale == pytest.approx(network.logit_scale.detach().exp().item())
    assert (encoder.logit_bias is None) == (kind == "clip")


def test_a_pooled_output_without_weights_gives_way_to_the_class_token(saved: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint of a classifier has none, and transformers would draw random ones."""
    config = transformers.ViTConfig(**VISION)
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(tmp_path)
    vit()[1].save_pretrained(tmp_path)
    model = resolve(Model(name=f"hf:{tmp_path}"))
    pixels = preprocess_of(model)(IMAGES[0])[None].copy()
    vectors = ImageEncoder(model, precision="fp32", batch_size=1, normalize=False).encode(pixels).vectors["clip"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    with torch.inference_mode():
        hidden = network.eval().vit(**processor(images=IMAGES[:1], return_tensors="pt")).last_hidden_state
    assert np.abs(vectors - hidden[:, 0].numpy()).max() <= 1e-5


def test_weights_that_are_missing_or_change_are_told(saved: dict[str, Path], tmp_path: Path) -> None:
    network, processor = vit()
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    before = resolve(Model(name=f"hf:{tmp_path}"))
    save_file({k: v for k, v in load_file(weights).items() if k != "layernorm.weight"}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="this machine's weights are not those that the run started with"):
        load(before)
    with pytest.raises(ModelError, match=r"its weights lack layernorm\.weight") as caught:
        load(resolve(Model(name=f"hf:{tmp_path}")))
    assert "\n" not in str(caught.value)


def test_refusals(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "expected a folder with transformers' config.json, or `hf:org/model`" in refusal("hf:/no/such/folder")
    assert "transformers cannot read it" in refusal(f"hf:{tmp_path}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "could not be downloaded (" in refusal("hf:nobody/no-such-model-of-these-tests")
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(do_center_crop=False).save_pretrained(tmp_path)
    assert "its images are not cropped to one size" in refusal(f"hf:{tmp_path}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "clipray[hf]"' in refusal(f"hf:{saved['vit']}")
