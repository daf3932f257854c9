"""Every kind of row: a row on which the network fails is rejected alone, and all others are as without it."""

from __future__ import annotations

import io
import pkgutil
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from clipray import tables
from clipray.analysis.zero_shot import ZeroShot
from clipray.job import EmbedRegions, Feature, Lettering, Model, RenderDepth
from clipray.models.features import Features
from clipray.models.resolve import ResolvedModel, resolve
from clipray.models.text_encoder import Tokens
from clipray.pipelines.block_encoder import BlockEncoder, encode_or_reject, start_encoder
from clipray.pipelines.image_loader import BlockDecoder
from clipray.pipelines.spec import (
    AttackSpec,
    CaptionSpec,
    CloudSpec,
    EncoderSpec,
    ImageSpec,
    Limits,
    RegionSpec,
    TextSpec,
)
from clipray.tables.reasons import Rejected

WIDTH = 128  # of the demo's vectors
LABELS = ("red circle", "blue square", "green star")


class FakeImages:
    """Vectors that tell images apart. `fails_on`: an image; `error`: what it raises for it, unless it is None: NaN."""

    def __init__(self, _: ResolvedModel, **__: Any) -> None:
        self.batch_size, self.facts = 4, {}
        self.fails_on: np.ndarray | None = None
        self.error: Exception | None = RuntimeError("this image")

    def encode(self, pixels: np.ndarray, boxes: Sequence[np.ndarray] | None = None) -> Features[np.ndarray]:
        bad = np.array([self.fails_on is not None and np.array_equal(image, self.fails_on) for image in pixels])
        if bad.any() and self.error:
            raise self.error
        x = pixels.reshape(len(pixels), -1)[:, : 64 * WIDTH].reshape(len(pixels), 64, WIDTH).mean(1).astype(np.float32)
        x[bad] = np.nan
        counts = [len(b) for b in boxes or ()]
        return Features({"clip": x}, boxes=np.repeat(x, counts, axis=0) if boxes else None)


class FakeTexts:
    """A text's vector is the number of its first character. Fails on texts that start with `!`, cannot tokenise `?`."""

    error: Exception | None = RuntimeError("this text")

    def __init__(self, _: ResolvedModel, **__: Any) -> None:
        self.batch_size, self.facts = 4, {}

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        if any(text.startswith("?") for text in texts):
            raise ValueError("no tokens")
        return Tokens(torch.tensor([[ord(text[0])] for text in texts]), np.array([len(text) > 20 for text in texts]))

    def encode_tokens(self, tokens: Tokens) -> np.ndarray:
        x = np.zeros((len(tokens.ids), WIDTH), np.float32)
        x[np.arange(len(x)), tokens.ids[:, 0].numpy()] = 1
        bad = tokens.ids[:, 0].numpy() == ord("!")
        if bad.any() and self.error:
            raise self.error
        x[bad] = np.nan
        return x


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("image", "region", "attack", "point_cloud"):
        monkeypatch.setattr(f"clipray.pipelines.{module}.ImageEncoder", FakeImages)
    monkeypatch.setattr("clipray.pipelines.text.TextEncoder", FakeTexts)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def cloud(number: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(number).normal(size=(50, 3)))
    return file.getvalue()


def common(table: str, vectors: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    schema = tables.arrow_schema(table, vectors, **more)
    return {"model": resolve(Model(name="demo")), "schema": schema, "threads": 2, "batch_size": 4}


def images(count: int = 7, **columns: Any) -> pa.Table:
    """Images, of which the third cannot be decoded."""
    data = [png(n) if n != 2 else b"nothing" for n in range(count)]
    return pa.table({"image_id": [f"i{n}" for n in range(count)], "bytes": data, **columns})


def image_spec(**more: Any) -> ImageSpec:
    return ImageSpec(**common("images", {"clip": WIDTH}), limits=Limits(), features={"clip": Feature()}, **more)


def region_spec(prompt: str) -> RegionSpec:
    how = EmbedRegions(manifest="m", prompt=prompt)  # type: ignore[arg-type]
    regions = tables.arrow_schema("regions", {"clip": WIDTH})
    return RegionSpec(**common("region_pictures"), region_schema=regions, limits=Limits(), how=how)


def boxed() -> pa.Table:
    return images(boxes=[[[0.0, 0.0, 32.0, 32.0], [8.0, 8.0, 60.0, 60.0]]] * 7)


def attack_spec() -> AttackSpec:
    lettering = Lettering()
    return AttackSpec(
        **common("attacks"),
        limits=Limits(),
        labels=LABELS,
        classifier=partial(ZeroShot, np.eye(3, WIDTH, dtype=np.float32), 100.0, top=1, precision="fp32"),
        lettering=lettering,
        own_label=False,
        seed=0,
    )


def cloud_spec(prompt: str) -> CloudSpec:
    how = RenderDepth(manifest="m", prompt=prompt)  # type: ignore[arg-type]
    return CloudSpec(**common("clouds", {"clip": WIDTH}), limits=Limits(), how=how)


def clouds() -> pa.Table:
    data = [cloud(n) if n != 2 else b"nothing" for n in range(7)]
    return pa.table({"cloud_id": [f"c{n}" for n in range(7)], "bytes": data})


CASES: dict[str, tuple[Callable[[], ImageSpec], Callable[[], pa.Table]]] = {
    "images": (image_spec, images),
    "regions, foveal": (lambda: region_spec("foveal"), boxed),
    "regions, crop": (lambda: region_spec("crop"), boxed),
    "regions, none": (lambda: region_spec("none"), boxed),
    "attacks": (attack_spec, lambda: images(label=[LABELS[n % 3] for n in range(7)])),
    "clouds, foveal": (lambda: cloud_spec("foveal"), clouds),
    "clouds, none": (lambda: cloud_spec("none"), clouds),
}


def built(spec: EncoderSpec) -> BlockEncoder[Any, Any, Any]:
    encoder = spec.build(lambda _: None)
    assert isinstance(encoder, BlockEncoder)
    return encoder


def fail_on(encoder: BlockEncoder[Any, Any, Any], row: pa.Table, error: Exception | None) -> None:
    """Let the network fail on the (first) image of a row."""
    (item,) = encoder.load(row)
    pixels = (item[0] if isinstance(item, tuple) else item).pixels
    encoder.encoder.fails_on = pixels.reshape(-1, *pixels.shape[-3:])[0]
    encoder.encoder.error = error


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", [RuntimeError("this image"), ValueError("this image"), None], ids=repr)
def test_a_row_on_which_the_network_fails_is_rejected_alone(case: str, error: Exception | None) -> None:
    make_spec, make_block = CASES[case]
    block, encoder = make_block(), built(make_spec())
    whole = encoder(block)
    assert [reason for reason in whole["reason"].to_pylist() if reason] == [whole["reason"][2].as_py()]
    assert whole["stage"][2].as_py() == "decode"
    fail_on(encoder, block.slice(4, 1), error)
    result = encoder(block)
    assert result["reason"].to_pylist()[4] == "encode_failed"
    assert result["stage"].to_pylist()[4] == "encode"
    message = f"{type(error).__name__}: this image" if error else "not finite"
    assert message in result["message"][4].as_py()
    others = pa.array([n for n in range(7) if n != 4])
    assert result.take(others) == whole.take(others)
    assert result.schema == whole.schema


def test_images_decoded_elsewhere_fail_alone_too() -> None:
    decoded = BlockDecoder(image_spec(), lambda _: None)(images())
    encoder = built(image_spec())
    columns = encoder(images()).column_names
    fail_on(encoder, images().slice(5, 1), RuntimeError("this image"))
    result = encoder(decoded)
    assert result["reason"].to_pylist() == [None, None, "not_an_image", None, None, "encode_failed", None]
    assert result.select([name for name in columns if name != "message"]) == encoder(images()).select(
        [name for name in columns if name != "message"]
    )


def text_spec() -> TextSpec:
    return TextSpec(**common("texts", {"embedding": WIDTH}))


@pytest.mark.parametrize("error", [RuntimeError("this text"), None], ids=repr)
def test_a_text_on_which_the_network_fails_is_rejected_alone(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTexts, "error", error)
    texts = ["a", None, "!b", "?c", " ", "d of more than twenty letters"]
    result = built(text_spec())(pa.table({"text_id": list("012345"), "text": texts}))
    assert result["reason"].to_pylist() == [None, "no_source", "encode_failed", "encode_failed", "empty", None]
    assert ("this text" if error else "not finite") in result["message"][2].as_py()
    assert result["message"][3].as_py() == "ValueError: no tokens"
    assert [x and x.index(1) for x in result["embedding"].to_pylist()] == [ord("a"), *[None] * 4, ord("d")]
    assert result["truncated"].to_pylist() == [False, None, None, None, None, True]


@pytest.mark.parametrize("error", [RuntimeError("this text"), None], ids=repr)
def test_a_caption_on_which_the_network_fails_is_rejected_alone(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeTexts, "error", error)
    spec = CaptionSpec(**common("caption_scores"), prefix="", image_vectors="vector", source="images.clip")
    rows = [
        ("a", "a cat", ["a", "", None], "a"),
        ("b", "!", [], "a"),
        ("c", "a cat", ["b", "!"], "a"),
        ("d", "?", [], "a"),
        ("e", "a cat", [], None),
        ("f", "a dog", None, "a"),
        ("g", "a bird", ["b"], "b"),
    ]
    vectors = [image and np.eye(WIDTH, dtype=np.float32)[ord(image)] for _, _, _, image in rows]
    block = pa.table(
        {
            "image_id": [image_id for image_id, *_ in rows],
            "caption_id": [image_id for image_id, *_ in rows],
            "caption": [caption for _, caption, *_ in rows],
            "references": [references for _, _, references, _ in rows],
            "vector": pa.array([v if v is None else v.tolist() for v in vectors], tables.vector_type(WIDTH)),
        }
    )
    result = built(spec)(block)
    failed = "encode_failed"
    assert result["reason"].to_pylist() == [None, failed, failed, failed, "no_such_image", None, None]
    assert all(("this text" if error else "not finite") in result["message"][n].as_py() for n in (1, 2))
    assert result["clipscore"].to_pylist() == [2.5, None, None, None, None, 2.5, 0]
    assert result["ref_clipscore"].to_pylist() == pytest.approx([2 * 2.5 / 3.5, *[None] * 5, 0])


@pytest.mark.parametrize("case", CASES)
def test_out_of_memory_on_the_smallest_batch_ends_the_run(case: str) -> None:
    make_spec, make_block = CASES[case]
    block, encoder = make_block(), built(make_spec())
    fail_on(encoder, block.slice(4, 1), torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        encoder(block)


def test_other_errors_of_the_network_end_the_run() -> None:
    encoder = built(image_spec())
    fail_on(encoder, images().slice(4, 1), TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        encoder(images())


def test_out_of_memory_on_texts_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTexts, "error", torch.OutOfMemoryError("no memory"))
    with pytest.raises(torch.OutOfMemoryError):
        built(text_spec())(pa.table({"text_id": ["0"], "text": ["!"]}))


def test_a_block_of_which_no_row_is_encoded_fits_the_others() -> None:
    """Blocks of one pass are written together, so all have one schema."""
    for make_spec, make_block in CASES.values():
        encoder, block = built(make_spec()), make_block()
        assert encoder(block.slice(2, 1)).schema.types == encoder(block).schema.types


def test_items_of_one_shape_are_encoded_together_and_results_keep_their_order() -> None:
    calls: list[list[str]] = []

    def encode(items: Sequence[str]) -> list[str]:
        calls.append(list(items))
        if "bad" in items:
            raise RuntimeError("no")
        return [item.upper() for item in items]

    rejected = Rejected("decode", "truncated", "m")
    results = encode_or_reject(encode, ["bad", "a", rejected, "bc", "d", "ef", "ghi"], len)
    assert [r.reason if isinstance(r, Rejected) else r for r in results] == [
        "encode_failed", "A", "truncated", "BC", "D", "EF", "GHI",
    ]  # fmt: skip
    assert calls == [["bad", "ghi"], ["bad"], ["ghi"], ["a", "d"], ["bc", "ef"]]
    assert encode_or_reject(encode, []) == []


def test_loading_goes_on_while_the_network_works_and_is_bounded() -> None:
    """The first chunk waits in the network; a bounded number of rows is loaded meanwhile, and no more."""
    loaded: list[int] = []
    go_on = threading.Event()

    class Counting(BlockEncoder[ImageSpec, FakeImages, int]):
        def load(self, block: pa.Table) -> Any:
            for n in range(len(block)):
                loaded.append(n)
                yield n

        def encode(self, items: Sequence[int]) -> list[Rejected]:
            go_on.wait(60)
            return [Rejected("encode", "encode_failed", str(n)) for n in items]

    encoder = Counting(image_spec(), lambda _: None, FakeImages)
    results: list[pa.Table] = []
    thread = threading.Thread(target=lambda: results.append(encoder(images(60))))
    thread.start()
    at_once, batch = encoder.spec.at_once, encoder.batch_rows
    while len(loaded) < (at_once + 1) * batch:
        thread.join(0.01)
    thread.join(0.1)
    assert len(loaded) == (at_once + 1) * batch  # those in the network, and one chunk that waits for it
    go_on.set()
    thread.join(60)
    assert results[0]["message"].to_pylist() == [str(n) for n in range(60)]


SPECS = [ImageSpec, RegionSpec, AttackSpec, CloudSpec, TextSpec, CaptionSpec]


@pytest.mark.parametrize("spec", SPECS)
def test_each_spec_names_the_block_encoder_that_takes_it(spec: type[EncoderSpec]) -> None:
    block_encoder = pkgutil.resolve_name(spec.block_encoder)
    assert issubclass(block_encoder, BlockEncoder)
    assert get_args(block_encoder.__orig_bases__[0])[0] is spec


def test_an_encoder_is_made_and_run_by_the_same_threads() -> None:
    made_by: list[str] = []

    def make(model: ResolvedModel, **options: Any) -> FakeImages:
        made_by.append(threading.current_thread().name)
        assert options == {"precision": "auto", "device": "cpu", "batch_size": 4, "normalize": True}
        return FakeImages(model)

    networks, _ = start_encoder(make, image_spec())
    assert networks.submit(lambda: threading.current_thread().name.split("_")[0]).result() == "encode"
    assert made_by[0].startswith("encode")
