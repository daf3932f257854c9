"""The training code: its pool, its batches, its losses by hand, and that what it saves is what it trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from clipray.demo import MODEL_DIR
from tools.demo_model import losses, measure
from tools.demo_model.compact import build_compact, save_full
from tools.demo_model.losses import list_texts
from tools.demo_model.pool import KINDS, Pool, as_seen, fill_pool, open_pool, training_sample
from tools.demo_model.train import Sampler, TrainSettings, rate_scale, train

N_PICTURES = 160


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    fill_pool(folder, seed=1_000_007, n_pictures=N_PICTURES, image_px=64, n_processes=1)
    return folder


@pytest.fixture(scope="module")
def pool(pool_folder: Path) -> Pool:
    return open_pool(pool_folder)


def _small_config(folder: Path) -> Path:
    config = measure.read_config(MODEL_DIR / "demo.json")
    config["vision_cfg"] |= {"layers": 1, "width": 32, "head_width": 16}
    config["text_cfg"] |= {"layers": 1, "width": 16}
    path = folder / "tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def test_pool_rows_repeat_what_a_sample_says(pool: Pool) -> None:
    assert pool.pixels.shape[1:] == (64, 64, 3)
    assert len(pool.pixels) <= N_PICTURES
    for kind in KINDS:
        row = int(np.flatnonzero(pool.kind_id == KINDS.index(kind))[0])
        sample = training_sample(1_000_007, 0, kind)
        np.testing.assert_array_equal(pool.pixels[row], as_seen(sample.image, 64))
        assert pool.captions[pool.caption_ids[row, 0]] == sample.captions[0]
        assert (pool.class_id[row], pool.ground_id[row]) == (sample.class_id, sample.ground_id)
        assert pool.place_number[row] == (0 if kind == "place" else -1)


def test_as_seen_is_what_open_clip_does() -> None:
    preprocess = open_clip.image_transform(64, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    for index in range(4):
        image = training_sample(1, index, "crop").image
        expected = (preprocess(image) * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(as_seen(image, 64), expected)


def test_batches_hold_two_views_of_some_places_after_the_easy_part(pool: Pool, tmp_path: Path) -> None:
    sampler = Sampler(pool, TrainSettings(pool=tmp_path, out=tmp_path, batch_size=32, places_per_batch=4))
    assert set(pool.kind_id[sampler.next_rows(easy=True)]) <= {KINDS.index("single"), KINDS.index("crop")}
    rows = sampler.next_rows(easy=False)
    numbers, counts = np.unique(pool.place_number[rows], return_counts=True)
    assert len(rows) == 32
    assert dict(zip(numbers, counts, strict=True))[-1] == 24
    assert set(counts[numbers >= 0]) == {2}
    assert len(numbers) == 5


def test_captions_that_also_fit_are_left_out_of_the_loss(pool: Pool) -> None:
    rows = np.flatnonzero(pool.class_id >= 0)[:40]
    batch = losses.text_batch(pool, rows, np.random.default_rng(0))
    assert not batch.also_true[torch.arange(len(rows)), batch.caption_of].any()
    for picture, caption in batch.also_true.nonzero().tolist():
        label = losses._LABELS[int(batch.answers["class"][picture])]
        assert batch.texts[caption].endswith(label)


def test_same_place_loss_by_hand() -> None:
    logits = torch.tensor([[9.0, 2.0, 1.0], [2.0, 9.0, 0.0], [1.0, 0.0, 9.0]])
    place_number = torch.tensor([5, 5, -1])
    # the diagonal is left out: -log softmax of 2 against (2, 1) and of 2 against (2, 0)
    expected = (np.log1p(np.exp(-1.0)) + np.log1p(np.exp(-2.0))) / 2
    assert losses._same_place(logits, place_number).item() == pytest.approx(expected, rel=1e-5)
    assert losses._same_place(logits, torch.tensor([1, 2, -1])).item() == 0.0


def test_rate_rises_then_falls() -> None:
    settings = TrainSettings(pool=Path(), out=Path(), warmup_steps=10)
    assert rate_scale(0, 0.0, settings) == pytest.approx(0.1)
    assert rate_scale(10, 0.5, settings) == pytest.approx(0.505)
    assert rate_scale(99, 1.0, settings) == pytest.approx(0.01)


def test_saved_model_encodes_like_the_compact_one(pool: Pool, tmp_path: Path) -> None:
    config = _small_config(tmp_path)
    torch.manual_seed(0)
    compact = build_compact(config, {*pool.captions, *list_texts()})
    live = list(compact.clip.parameters())
    save_full(compact, live, [p.detach().float() for p in live], tmp_path / "tiny.safetensors")
    clip = measure.load_demo(config)
    texts = ["a photo of a red circle", pool.captions[0]]
    with torch.inference_mode():
        expected = compact.encode_text(texts).numpy()
    assert (expected * clip.encode_texts(texts)).sum(axis=1).min() > 0.999  # bf16 against fp32


def test_a_short_training_run_writes_loadable_weights(pool_folder: Path, tmp_path: Path) -> None:
    _small_config(tmp_path)
    settings = TrainSettings(
        pool=pool_folder, out=tmp_path, name="tiny", batch_size=32, places_per_batch=4, steps=4, n_held_out=16
    )
    weights = train(settings)
    assert load_file(weights)["token_embedding.weight"].shape == (49408, 16)
    assert measure.load_demo(tmp_path / "tiny.json").encode_texts(["a star"]).shape == (1, 128)
