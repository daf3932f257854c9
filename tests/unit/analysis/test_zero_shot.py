"""Zero-shot classification against open_clip's own, against float64, and by hand."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch

from clipray.analysis.prompts import PromptStyle, split
from clipray.analysis.zero_shot import ZeroShot, class_vectors
from clipray.demo.prompts import class_labels
from clipray.job import Model
from clipray.models.load import load
from clipray.models.resolve import resolve
from clipray.models.text_encoder import TextEncoder
from clipray.pipelines.class_texts import class_vectors_of

WIDTH, SCALE = 128, 100.0


def spread(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and class vectors in two cones, as CLIP's are; the logits of a row have a standard deviation of 3."""
    rng = np.random.default_rng(seed)
    scale = np.arange(1, WIDTH + 1) ** -0.5
    scale /= np.linalg.norm(scale)
    cones = np.linalg.qr(rng.normal(size=(WIDTH, 2)))[0].T
    c = 0.6 * rng.normal(size=(classes, WIDTH)) * scale + cones[0]
    x = 0.28 * rng.normal(size=(rows, WIDTH)) * scale + cones[1]
    x += 0.1 * c[rng.integers(0, classes, rows)]
    return tuple((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32) for v in (x, c))  # type: ignore[return-value]


def softmax_of(x: np.ndarray, c: np.ndarray) -> np.ndarray:
    logits = SCALE * x.astype(np.float64) @ c.T.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize(
    "templates", [("a photo of a {}",), ("a photo of a {}", "a small {}", "{} on a black background")]
)
def test_class_vectors_and_probabilities_are_open_clips(templates: tuple[str, ...]) -> None:
    model, labels = resolve(Model(name="demo")), class_labels()
    network, tokenizer = load(model), open_clip.get_tokenizer("demo")
    with torch.inference_mode():
        theirs = open_clip.build_zero_shot_classifier(network, tokenizer, labels, templates)  # (d, k)
        pixels = torch.rand(50, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        images = network.encode_image(pixels, normalize=True)
        expected = (network.logit_scale.exp() * images @ theirs).softmax(dim=1).numpy()
    encoder = TextEncoder(model, precision="fp32", batch_size=64)
    style = PromptStyle("template", labels, templates=templates)
    ours, counts, _ = class_vectors_of(style, range(len(labels)), encoder)
    assert np.abs(ours - theirs.T.numpy()).max() <= 1e-5
    assert set(counts) == {len(templates)}
    found = ZeroShot(ours, encoder.logit_scale, top=64, precision="fp32").label(images.numpy())
    assert np.abs(found.probabilities - np.take_along_axis(expected, found.classes.astype(int), 1)).max() <= 1e-5
    assert (np.diff(found.probabilities) <= 0).all()
    assert (np.sort(found.classes) == np.arange(64)).all()


@pytest.mark.parametrize(("classes", "top"), [(1, 5), (3, 2), (17, 5), (200, 5), (1000, 5), (1000, 1), (1500, 20)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_are_those_of_float64(classes: int, top: int, precision: str) -> None:
    """Also with bf16, whose probabilities are off by what it does to the classes behind the best."""
    x, c = spread(1_500, classes)
    p = softmax_of(x, c)
    found = ZeroShot(c, SCALE, top=top, precision=precision).label(x)  # type: ignore[arg-type]
    best = np.sort(p)[:, ::-1][:, :top]
    named = np.take_along_axis(p, found.classes.astype(int), 1)
    assert found.classes.shape == (1_500, min(top, classes))
    assert np.abs(named - best).max() <= 1e-5  # the classes are the best ones, or as good
    off = np.abs(found.probabilities - named)
    assert off.max() <= (1e-5 if precision == "fp32" else 5e-3)
    assert off.mean() <= (1e-6 if precision == "fp32" else 3e-4)


@pytest.mark.parametrize("scale", [400.0, 1_500.0, 20_000.0])
def test_bf16_of_very_large_logits(scale: float) -> None:
    """Rounding errors far beyond what an exponential can hold; nothing is left of all classes but a few."""
    x, c = spread(200, 300)
    logits = scale * x.astype(np.float64) @ c.T.astype(np.float64)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    top = ZeroShot(c, scale, precision="bf16").label(x)
    assert np.array_equal(top.classes, best)
    assert np.abs(top.probabilities - np.take_along_axis(p, best, 1)).max() <= 2e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_bf16_of_a_row_that_is_not_finite(value: float) -> None:
    """Its probabilities are NaN, its classes are classes, and other rows do not notice."""
    x, c = spread(40, 300)
    expected = ZeroShot(c, SCALE, precision="bf16").label(x)
    x[7, :3] = value
    top = ZeroShot(c, SCALE, precision="bf16").label(x)
    assert np.isnan(top.probabilities[7]).any()
    assert 0 <= top.classes.min() <= top.classes.max() < 300
    others = np.arange(40) != 7
    assert np.array_equal(top.classes[others], expected.classes[others])
    assert np.array_equal(top.probabilities[others], expected.probabilities[others])


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_tens_of_thousands_of_classes(precision: str, off: float) -> None:
    x, c = spread(20, 70_000)
    p = softmax_of(x, c)
    top = ZeroShot(c, SCALE, precision=precision).label(x)  # type: ignore[arg-type]
    assert np.array_equal(top.classes, np.argsort(-p, axis=1)[:, :5])
    assert np.abs(top.probabilities - np.sort(p)[:, ::-1][:, :5]).max() <= off


def test_close_classes_are_told_apart_by_bf16_too() -> None:
    """Hundreds of classes within bf16's rounding of one another."""
    x, c = spread(300, 20)
    rng = np.random.default_rng(1)
    c = np.repeat(c, 30, axis=0) + rng.normal(size=(600, WIDTH)).astype(np.float32) * 1e-4
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    p = softmax_of(x, c)
    found = ZeroShot(c, SCALE, top=5, precision="bf16").label(x)
    named = np.take_along_axis(p, found.classes.astype(int), 1)
    assert np.abs(named - np.sort(p)[:, ::-1][:, :5]).max() <= 1e-6


def test_large_logits_do_not_overflow_and_nan_shows() -> None:
    rng = np.random.default_rng(0)
    c = rng.normal(size=(400, WIDTH)).astype(np.float32)
    c /= np.linalg.norm(c, axis=1, keepdims=True)
    x = c[:5].copy()
    x[3, 2] = np.nan
    for precision in ("fp32", "bf16"):
        p = ZeroShot(c, 1e4, precision=precision).label(x).probabilities  # type: ignore[arg-type]
        assert np.isnan(p).any(axis=1).tolist() == [False, False, False, True, False]
        assert np.allclose(p[[0, 1, 2, 4], 0], 1)


def test_float16_vectors() -> None:
    x, c = spread(100, 300)
    half = x.astype(np.float16)
    a, b = (ZeroShot(c, SCALE, precision="fp32").label(v).probabilities for v in (half, half.astype(np.float32)))
    assert np.array_equal(a, b)


def test_against_a_negative_prompt_and_by_a_bias() -> None:
    """The softmax of a class and its negative, and SigLIP's sigmoid, for each class by itself."""
    x, c = spread(700, 300)
    _, against = spread(1, 300, seed=5)
    cosines = x.astype(np.float64) @ c.T.astype(np.float64)
    for precision in ("fp32", "bf16"):
        for negatives in (against[:1], against):
            found = ZeroShot(c, SCALE, precision=precision, negatives=negatives).label(x)  # type: ignore[arg-type]
            expected = 1 / (1 + np.exp(-SCALE * (cosines - x.astype(np.float64) @ negatives.T.astype(np.float64))))
            assert np.abs(found.probabilities - np.sort(expected)[:, ::-1][:, :5]).max() <= 2e-5
        for sign in (1, -1):  # also where the best logits are negative
            found = ZeroShot(c, 10.0, precision=precision, logit_bias=-3.0).label(sign * x)  # type: ignore[arg-type]
            expected = 1 / (1 + np.exp(3.0 - 10 * sign * cosines))
            assert np.abs(found.probabilities - np.sort(expected)[:, ::-1][:, :5]).max() <= 1e-5


def test_the_mean_of_a_class_by_hand() -> None:
    vectors = np.array([[2, 0], [0, 1], [0, -3]], np.float32)
    assert np.allclose(class_vectors(vectors, np.array([2, 1])), [[0.5**0.5, 0.5**0.5], [0, -1]])


def words(text: str) -> int:
    return len(text.split()) + 2  # as a tokenizer counts, with start and end


def test_long_descriptions_become_sentences_and_halves() -> None:
    text = "A dog is an animal. It barks at cats!  Dogs have been friends of people for a very long time indeed."
    assert split(text, words, 100) == [" ".join(text.split())]
    parts = split(text, words, 9)
    assert parts[:2] == ["A dog is an animal.", "It barks at cats!"]
    assert all(words(part) <= 9 for part in parts)
    assert " ".join(parts) == " ".join(text.split())
    assert split("Donaudampfschifffahrtsgesellschaft", lambda _: 99, 9) == ["Donaudampfschifffahrtsgesellschaft"]


def test_a_class_is_said_in_each_style() -> None:
    labels, said = ("hen", "cock"), (("It lays eggs.",), ("It crows.", "It struts about."))
    texts = {
        "t": PromptStyle("t", labels, templates=("a {}", "{} {}!")).texts(0, words, 77),
        "d": PromptStyle("d", labels, descriptions=said).texts(1, words, 77),
        "n": PromptStyle("n", labels, descriptions=said, named=True).texts(1, words, 77),
    }
    assert texts == {
        "t": ["a hen", "hen hen!"],
        "d": ["It crows.", "It struts about."],
        "n": ["cock is It crows.", "cock is It struts about."],
    }
