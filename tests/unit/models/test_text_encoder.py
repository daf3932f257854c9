"""Texts: the same vectors as open_clip's own code for every kind of text tower, and which texts were cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clipray.errors import ModelError
from clipray.job import Model
from clipray.models import encoder as encoders
from clipray.models.resolve import resolve
from clipray.models.text_encoder import SAMPLE_TEXTS, TextEncoder
from clipray.models.tokenizer import Tokenizer

VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"text_cfg": TEXT},
    "custom": {"text_cfg": TEXT, "custom_text": True},
    "siglip": {"text_cfg": {**TEXT, **SIGLIP}, "custom_text": True, "init_logit_bias": -10},
    "first": {"text_cfg": {**TEXT, "pool_type": "first", "no_causal_mask": True}, "custom_text": True},
    "eos": {"text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}, "custom_text": True},
    "coca": {
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"width": 32, "heads": 2, "layers": 1, "context_length": 24, "vocab_size": 49408},
        "custom_text": True,
    },
}
WORD = "a"  # one token
TEXTS = [
    "a red circle",
    "",
    "  Spaces,\tand 'quotes' &amp; a smile 😀 ",
    "!!",
    "a <end_of_text> in the middle",
    " ".join([WORD] * 21),
    " ".join([WORD] * 22),  # with start and end, just the context
    " ".join([WORD] * 23),
    "incomprehensibilities and more " * 30,
    "ﬁne ünïcödé ½",
]
CUT = [False] * 7 + [True, True, False]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind -> `local-dir:` name of a saved model with seeded weights."""
    names = {}
    for kind, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        values = {"embed_dim": 16, "vision_cfg": VISION, **config}
        (folder / f"{kind}.json").write_text(json.dumps(values))
        open_clip.add_model_config(folder / f"{kind}.json")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            network = open_clip.create_model(kind)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": values, "preprocess_cfg": {}}))
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")
        names[kind] = f"local-dir:{folder}"
    return names


def encoder(name: str, **options: Any) -> TextEncoder:
    return TextEncoder(resolve(Model(name=name)), **{"precision": "fp32", "batch_size": 4, **options})


def upstream(name: str, texts: list[str]) -> np.ndarray:
    """open_clip's own way, as its README shows it; raw text features."""
    network = open_clip.create_model(name).eval()
    with torch.inference_mode():
        return network.encode_text(open_clip.get_tokenizer(name)(texts), normalize=False).numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_vectors_are_open_clips(models: dict[str, str], kind: str) -> None:
    expected = upstream(models[kind], TEXTS)
    assert (
        len({row.tobytes() for row in expected}) == len(TEXTS) - 1
    )  # a network that tells texts apart, but for the cut
    found, cut = encoder(models[kind], normalize=False).encode(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), 16))
    assert np.abs(found - expected).max() <= 1e-5
    assert cut.tolist() == CUT
    unit, _ = encoder(models[kind]).encode(TEXTS)
    assert np.abs(unit - expected / np.linalg.norm(expected, axis=1, keepdims=True)).max() <= 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_points_the_same_way(models: dict[str, str], kind: str) -> None:
    expected, _ = encoder(models[kind]).encode(TEXTS)
    found, _ = encoder(models[kind], precision="bf16").encode(TEXTS)
    assert (found * expected).sum(axis=1).min() >= 0.999


def test_the_demo_model() -> None:
    model = resolve(Model(name="demo"))
    mine = TextEncoder(model, precision="fp32", batch_size=16)
    network = open_clip.create_model("demo", pretrained=model.pretrained).eval()
    texts = [*TEXTS, *SAMPLE_TEXTS]
    with torch.inference_mode():
        expected = network.encode_text(open_clip.get_tokenizer("demo")(texts), normalize=True).numpy()
    assert np.abs(mine.encode(texts)[0] - expected).max() <= 1e-5
    assert mine.context_length == 32
    assert mine.logit_scale == pytest.approx(network.logit_scale.exp().item())
    assert mine.logit_bias is None
    fast = TextEncoder(model, precision="bf16", batch_size=16)
    assert (fast.encode(texts)[0] * expected).sum(axis=1).min() >= 0.999
    assert 0.999 <= fast.facts["self_check_cosine"] < 1


@pytest.mark.parametrize(("kind", "cuts"), [("clip", True), ("custom", True), ("eos", True), ("siglip", False)])
def test_only_a_network_that_reads_nothing_behind_the_end_gets_shorter_texts(
    models: dict[str, str], kind: str, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, widths = encoder(models[kind]), []
    assert mine.network.cuts == cuts
    real = mine.network.forward
    monkeypatch.setattr(mine.network, "forward", lambda tokens: (widths.append(tokens.shape[1]), real(tokens))[1])
    mine.encode([*TEXTS[:4], TEXTS[8]])
    assert widths == ([16, 24] if cuts else [24, 24])  # of whole steps of 8; the longest text comes last


def test_a_tower_without_pictures(models: dict[str, str]) -> None:
    for kind in ("clip", "custom", "coca"):
        names = [name for name, _ in encoder(models[kind]).network.named_parameters()]
        assert names
        assert not [name for name in names if ".visual." in name or "text_decoder" in name]


def test_scale_and_bias_are_the_models_own(models: dict[str, str]) -> None:
    assert encoder(models["siglip"]).logit_bias == -10
    assert encoder(models["siglip"]).logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    assert encoder(models["clip"]).logit_bias is None


def test_counted_tokens(models: dict[str, str]) -> None:
    mine = encoder(models["clip"])
    assert [mine.token_count(text) for text in ("", WORD, " ".join([WORD] * 100))] == [2, 3, 102]
    assert [mine.token_count(text) > 24 for text in TEXTS] == CUT


def test_batches_and_order_do_not_matter(models: dict[str, str]) -> None:
    expected, _ = encoder(models["clip"], batch_size=64).encode(TEXTS)
    for batch_size in (1, 3):
        found, cut = encoder(models["clip"], batch_size=batch_size).encode(TEXTS[::-1])
        assert np.abs(found[::-1] - expected).max() <= 1e-6
        assert cut[::-1].tolist() == CUT


def test_no_texts(models: dict[str, str]) -> None:
    vectors, cut = encoder(models["clip"]).encode([])
    assert (vectors.shape, vectors.dtype, cut.shape, cut.dtype) == ((0, 16), np.float32, (0,), bool)


def test_the_fastest_batch_is_one_of_those_tried(models: dict[str, str]) -> None:
    found = encoder(models["clip"], batch_size="auto")
    assert found.batch_size == found.facts["batch_size"] in (16, 32, 64, 128, 256)


def test_out_of_memory_halves_the_batch_and_goes_on(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = encoder(models["clip"], batch_size=8)
    expected, _ = mine.encode(TEXTS)
    real, tried = mine.network.forward, []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        tried.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tokens)

    monkeypatch.setattr(mine.network, "forward", forward)
    assert np.abs(mine.encode(TEXTS)[0] - expected).max() <= 1e-6
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert mine.facts["batch_size"] == 2


def test_a_precision_that_fails_its_check(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "MIN_COSINE", 1.1)
    with pytest.raises(ModelError, match=r"precision bf16: cosine to fp32 on the test texts is \d.\d+"):
        encoder(models["clip"], precision="bf16")
    monkeypatch.setattr(encoders, "native_precision", lambda device: "bf16")
    fallen = encoder(models["clip"], precision="auto")
    assert fallen.facts["precision"] == "fp32"
    assert np.array_equal(fallen.encode(TEXTS)[0], encoder(models["clip"]).encode(TEXTS)[0])


# --- tokenizers of other makes


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A saved model whose tokenizer is one of Hugging Face's: whole words, end and start tokens as in BERT."""
    pytest.importorskip("transformers", reason="open_clip needs it for such tokenizers")
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Words(models.WordLevel({word: n for n, word in enumerate([*special, "a", "dog"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(tmp_path)
    text = {**TEXT, "vocab_size": 8, "hf_tokenizer_name": "mine", "pool_type": "last", "no_causal_mask": True}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text, "custom_text": True}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = open_clip.CustomTextCLIP(16, VISION, text)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_a_tokenizer_of_hugging_face(foreign: Path) -> None:
    texts = ["a dog", "", " ".join(["dog"] * 22), " ".join(["dog"] * 23)]
    found, cut = encoder(f"local-dir:{foreign}", normalize=False).encode(texts)
    assert np.abs(found - upstream(f"local-dir:{foreign}", texts)).max() <= 1e-5
    assert cut.tolist() == [False, False, False, True]
    counted = Tokenizer(resolve(Model(name=f"local-dir:{foreign}"))).counts(texts)
    assert counted == [4, 2, 24, 25]


def test_a_tokenizer_that_is_not_there(models: dict[str, str], tmp_path: Path) -> None:
    folder = Path(models["custom"].removeprefix("local-dir:"))
    values = json.loads((folder / "open_clip_config.json").read_text())
    values["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "nobody/nothing"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(values))
    (tmp_path / "open_clip_model.safetensors").write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="its tokenizer could not be loaded") as caught:
        encoder(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
