"""The shipped demo model, through plain open_clip, on scenes of seeds that it was not trained with."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipray.demo import MODEL_DIR, prompts
from clipray.demo.world import TRAINING_SEEDS_FROM, write_world
from tools.demo_model import measure

NAMES = ("demo", "demo-rn")
N_SCENES = {"demo": 1000, "demo-rn": 320}
MAX_BYTES = 12 * 1024 * 1024
SEED = 9_000


@pytest.fixture(scope="module", params=NAMES)
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    assert SEED + 100 < TRAINING_SEEDS_FROM
    n_scenes, folder = N_SCENES[request.param], tmp_path_factory.mktemp("held-out")
    world = write_world(folder, seed=SEED, n_scenes=n_scenes, n_groups=50, n_words=0, n_places=20, side_px=160)
    clip = measure.load_demo(MODEL_DIR / f"{request.param}.json")
    return measure.world_figures(clip, world) | measure.word_figures(clip, seed=SEED + 10, n_scenes=80, side_px=160)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small_half_precision_tensors(name: str) -> None:
    sizes = [path.stat().st_size for path in MODEL_DIR.glob("*.safetensors")]
    assert sum(sizes) <= MAX_BYTES
    state = load_file(MODEL_DIR / f"{name}.safetensors")
    counters = {key for key in state if key.endswith("num_batches_tracked")}
    assert {value.dtype for key, value in state.items() if key not in counters} == {torch.float16}
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_token_rows_that_never_occur_are_zero(name: str) -> None:
    table = load_file(MODEL_DIR / f"{name}.safetensors")["token_embedding.weight"]
    in_use = set((table.abs().sum(dim=1) > 0).nonzero().flatten().tolist())
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    prompt = set(tokenizer("a photo of a red circle")[0].tolist()) - {0}
    assert prompt <= in_use
    assert len(in_use) < 500


@pytest.mark.parametrize("name", NAMES)
def test_plain_open_clip_loads_the_configuration_and_the_weights(name: str) -> None:
    config, weights = MODEL_DIR / f"{name}.json", MODEL_DIR / f"{name}.safetensors"
    open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=str(weights))
    state = load_file(weights)
    assert set(state) == set(model.state_dict())
    assert sum(value.numel() for value in state.values()) < 6_000_000
    tokens = open_clip.get_tokenizer(name)(["a red circle"])
    assert tokens.shape == (1, json.loads(config.read_text())["text_cfg"]["context_length"])
    assert model.visual.image_size in (64, (64, 64))
    assert "bicubic" in str(preprocess).lower()


def test_the_longest_prompt_fits_the_context() -> None:
    tokens = open_clip.SimpleTokenizer(context_length=77)(
        [prompts.class_prompt(label, style) for label in prompts.class_labels() for style in prompts.PROMPT_STYLES]
    )
    context_length = measure.read_config(MODEL_DIR / "demo.json")["text_cfg"]["context_length"]
    assert int((tokens != 0).sum(dim=1).max()) <= context_length


@pytest.mark.parametrize("style", prompts.PROMPT_STYLES)
def test_zero_shot_accuracy_over_64_classes(figures: dict[str, float], style: str) -> None:
    assert figures[f"zero-shot accuracy, {style}"] >= 0.95


def test_text_finds_pictures(figures: dict[str, float]) -> None:
    assert figures["text to image recall@5"] >= 0.90


def test_a_caption_prefers_its_own_box(figures: dict[str, float]) -> None:
    assert figures["own box before another (pairs)"] >= 0.85


def test_a_contradicting_word_changes_labels_and_a_true_one_hardly_does(figures: dict[str, float]) -> None:
    assert figures["contradicting word: label flips"] > 0.05
    assert figures["true word: label flips"] < figures["contradicting word: label flips"]
    own = figures["contradicting word: colour or shape of the contradicting word"]
    assert own > figures["meaningless word: colour or shape of the contradicting word"]


def test_places_are_found_again(figures: dict[str, float]) -> None:
    assert figures["places: mAP easy"] >= 0.95
    assert figures["places: mAP medium"] >= 0.9
    assert figures["places: mAP hard"] >= 0.85


def test_average_precision_by_hand() -> None:
    # hits at ranks 1 and 3: (1/1 + 2/3) / 2
    assert measure._average_precision(np.array([True, False, True, False])) == pytest.approx(5 / 6)


def test_recall_counts_any_picture_with_the_same_caption() -> None:
    class Fake:
        def encode_texts(self, texts: list[str]) -> np.ndarray:
            return np.eye(2, dtype=np.float32)[[("a", "b").index(text) for text in texts]]

    images = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.0]], dtype=np.float32)
    # "a" finds picture 0 (its own); "b" finds picture 1 first, which is captioned "a"
    recall = measure.caption_recall(Fake(), images, ["a", "a", "b"], top=1)  # type: ignore[arg-type]
    assert recall == 0.5
