"""Images from servers: fetched in many threads, decoded in few, within a number of bytes, in the order of their rows."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from support import AS_IT_IS, Answer, Website

from clipray.job import Model
from clipray.models.preprocess import Preprocess
from clipray.models.resolve import resolve
from clipray.pipelines import image_loader
from clipray.pipelines.decode import DecodedImage
from clipray.pipelines.decode_memory import ByteBudget
from clipray.pipelines.image_fetch import Fetcher, NoRoom
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.spec import ImageSpec, Limits
from clipray.tables.reasons import Rejected

LIMITS = Limits(schemes=("file", "http", "memory"), max_bytes=600_000)
ROWS = 60


def image_of(number: int, most_bytes: int = 0) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(sink, "PNG")
    return sink.getvalue().ljust(most_bytes, b"\0")


@pytest.fixture(scope="module")
def site() -> Iterator[Website]:
    site = Website()
    for n in range(ROWS):
        site.answers[f"/{n}"] = [Answer(image_of(n, 500_000 if n % 5 == 0 else 0), length=n % 2 == 0)]
    site.answers["/40"] = [Answer(b"gone", 404)]
    yield site
    site.stop()


def loader(threads: int = 2, limits: Limits = LIMITS) -> ImageLoader:
    return ImageLoader(
        ImageSpec(model=resolve(Model(name="demo")), limits=limits, schema=pa.schema([]), threads=threads)
    )


def colours(loaded: list[DecodedImage | Rejected]) -> list[int | str]:
    return [item.reason if isinstance(item, Rejected) else int(item.pixels[0, 0, 0]) for item in loaded]


def test_rows_come_in_their_order_from_wherever_they_are(site: Website) -> None:
    uris = [f"{site.url}/{n}" if n % 3 else None for n in range(ROWS)]
    data = [None if n % 3 else image_of(n) for n in range(ROWS)]
    block = pa.table({"uri": pa.array(uris, pa.string()), "bytes": pa.array(data, pa.binary())})
    ways = [AS_IT_IS] * ROWS
    expected = ["http_404" if n == 40 else n for n in range(ROWS)]
    assert colours(list(loader().load(block, 16, ways))) == expected


def test_files_are_fetched_in_many_threads_decoded_in_few_and_bounded(
    site: Website, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of a million bytes, and images of half a million among them: two at once, and more of the small ones."""
    monkeypatch.setattr(image_loader, "REMOTE_BYTES", 1_000_000)
    monkeypatch.setattr(image_loader, "ROOM_BYTES", 1_000_000 // 32)
    most, fetchers, decoders, held = [0], set[str](), set[str](), [0]
    lock = threading.Lock()
    fetch = Fetcher.fetch

    def counted(self: Fetcher, uri: str, room: int | None = None) -> bytes:
        fetchers.add(threading.current_thread().name)
        raw = fetch(self, uri, room)
        with lock:
            held[0] += len(raw)
            most[0] = max(most[0], held[0])
        return raw

    def to_pixels(image: Image.Image, _height: int, _width: int) -> np.ndarray:
        decoders.add(threading.current_thread().name)
        return np.asarray(image)

    monkeypatch.setattr(Fetcher, "fetch", counted)
    here = loader()
    release = here._fetched.release

    def released(size: int) -> None:
        with lock:
            held[0] -= size if threading.current_thread().name.startswith("decode") else 0
        release(size)

    monkeypatch.setattr(here._fetched, "release", released)
    block = pa.table({"uri": [f"{site.url}/{n}" for n in range(ROWS)]})
    loaded = colours(list(here.load(block, 50, [Preprocess(to_pixels, AS_IT_IS.scratch_bytes)] * ROWS)))
    assert loaded == ["http_404" if n == 40 else n for n in range(ROWS)]
    assert {name.split("_")[0] for name in decoders} == {"decode"}
    assert {name.split("_")[0] for name in fetchers} == {"fetch"}
    assert len(decoders) <= 2 < len(fetchers)
    assert 500_000 <= most[0] <= 1_000_000
    assert here._fetched.held == 0


def test_a_host_is_asked_for_as_many_files_at_once_as_the_job_allows(
    site: Website, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, lock = [0], [0], threading.Lock()
    together, fetch = threading.Barrier(4), Fetcher.fetch

    def counted(self: Fetcher, uri: str, room: int | None = None) -> bytes:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(60)
        raw = fetch(self, uri, room)
        with lock:
            running[0] -= 1
        return raw

    monkeypatch.setattr(Fetcher, "fetch", counted)
    block = pa.table({"uri": [f"{site.url}/{n}" for n in range(20)]})
    limits = replace(LIMITS, connections_per_host=4)
    assert colours(list(loader(limits=limits).load(block, 20, [AS_IT_IS] * 20))) == list(range(20))
    assert most == [4]


def test_a_file_for_which_there_is_no_room_says_how_large_it_is(site: Website) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/room/a", bytes(5_000))
    site.answers |= {"/sized": [Answer(bytes(5_000))], "/unsized": [Answer(bytes(5_000), length=False)]}
    fetcher = Fetcher(LIMITS)
    for uri, size in (("memory://room/a", 5_000), (f"{site.url}/sized", 5_000), (f"{site.url}/unsized", 600_000)):
        with pytest.raises(NoRoom) as raised:
            fetcher.fetch(uri, 4_999)
        assert raised.value.size == size
        assert fetcher.fetch(uri, 5_000) == bytes(5_000)


def test_a_budget_is_kept_and_more_than_all_of_it_is_had_alone() -> None:
    budget, most, lock = ByteBudget(100), [0], threading.Lock()

    def work(size: int) -> int:
        budget.acquire(size)
        with lock:
            most[0] = max(most[0], budget.held)
            assert size <= 100 or budget.held == size
        budget.release(size)
        return size

    sizes = [1, 30, 70, 100, 250, 99] * 50
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, sizes)) == sizes
    assert (most[0], budget.held) == (250, 0)
