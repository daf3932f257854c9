"""Tars where they lie: what reading an image from a tar costs, and what the row index costs, on disk and on S3.

    python benchmarks/tars.py [PHOTOS_FOLDER] [--pairs 9] [--entries 1000000] [--only read index s3]

`read`: fetching, and fetching, decoding and scaling the same photos from one local tar and from single files, in turn.
`index`: 100 local tars, whose data are holes of the disk, in 2 processes; bytes read are those of all system calls.
`s3`: a tar of 10,000 members of 50 KB on a server in this process (moto). Needs the packages of `clipray[test]`.
"""

import argparse
import collections
import io
import logging
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipray.inputs.tar_index import index_group, index_tars
from clipray.inputs.tar_listing import list_tars
from clipray.inputs.tar_samples import Wanted, read_samples
from clipray.job import Model
from clipray.models.resolve import resolve
from clipray.pipelines.image_fetch import Fetcher
from clipray.pipelines.image_loader import ImageLoader
from clipray.pipelines.spec import ImageSpec, Limits
from clipray.storage.folder import Folder
from clipray.storage.uris import with_byte_range
from clipray.tables.reasons import Rejected

PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "photos"
BLOCK_ROWS = 128
TARS, REPEATS, FETCHES = 100, 4, 5
S3_MEMBERS, S3_BYTES = 10_000, 50_000


def in_tar(path: Path, files: Iterable[Path]) -> list[str]:
    """Write the files into one tar; their addresses in it."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            tar.add(file, f"{number:06d}.jpg")
    table = read_samples(list_tars(str(path))[0], Wanted()).table
    return addresses(table)


def addresses(table: pa.Table) -> list[str]:
    return [
        with_byte_range(*row)
        for row in zip(*(table[name].to_pylist() for name in ("uri", "offset", "size")), strict=True)
    ]


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def load(uris: list[str], schemes: tuple[str, ...]) -> None:
    """Decode and scale, block by block, as an encoder does."""
    spec = ImageSpec(model=resolve(Model(name="demo")), limits=Limits(schemes=schemes), schema=pa.schema([]), threads=2)
    loader = ImageLoader(spec)
    for start in range(0, len(uris), BLOCK_ROWS):
        for image in loader.load(pa.table({"uri": uris[start : start + BLOCK_ROWS]}), 64):
            assert not isinstance(image, Rejected), image.message


def load_local(uris: list[str]) -> None:
    load(uris, ("file",))


def fetch_often(uris: list[str]) -> None:
    fetcher = Fetcher(Limits())
    for uri in FETCHES * uris:
        fetcher.fetch(uri)


def read(photos: Path, pairs: int, home: Path) -> None:
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    single = []
    for repeat in range(REPEATS):
        for number, file in enumerate(files):
            copy = home / f"single/{repeat}/{number % 10}/{file.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
            single.append(copy)
    uris = in_tar(home / "photos.tar", single)
    singles = [str(path) for path in single]
    for name, work, each in (
        ("fetched", fetch_often, FETCHES),
        ("fetched, decoded and scaled", load_local, 1),
    ):
        of_files, of_tar = in_turn(work, singles, uris, pairs)
        ratios = [tar / files for files, tar in zip(of_files, of_tar, strict=True)]
        us = [1e6 * statistics.median(times) / len(uris) / each for times in (of_files, of_tar)]
        print(
            f"read: {len(uris)} photos {name}: {us[0]:.0f} core-us a photo as files, {us[1]:.0f} us in a tar, "
            f"ratio {statistics.median(ratios):.3f} (median of {pairs} pairs, {min(ratios):.3f} to {max(ratios):.3f})"
        )


def in_turn(
    work: Callable[[list[str]], None], one: list[str], other: list[str], pairs: int
) -> tuple[list[float], list[float]]:
    """Core-seconds of the work on each, in pairs whose order changes; both are in the page cache."""
    times: tuple[list[float], list[float]] = ([], [])
    work(one)
    work(other)
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 else (1, 0):
            uris = (one, other)[which]
            times[which].append(seconds(lambda uris=uris: work(uris), time.process_time))  # type: ignore[misc]
    return times


def write_tar(path: Path, samples: int) -> None:
    """Samples of a jpg of 50 KB, a txt and a json; only headers take room on the disk."""
    with open(path, "wb") as file:
        for number in range(samples):
            for extension, size in (("jpg", 50_000), ("txt", 60), ("json", 600)):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))


def bytes_read() -> int:
    """By this process, from wherever."""
    return int(Path("/proc/self/io").read_text().split()[1])


def counted(group: Any) -> Any:
    before = bytes_read()
    return index_group(group), bytes_read() - before


def index(entries: int, home: Path) -> None:
    (home / "tars").mkdir()
    for number in range(TARS):
        write_tar(home / f"tars/{number:05d}.tar", entries // TARS // 3)
    tars = list_tars(str(home / "tars"))
    asked = 0

    def work(groups: Any) -> list[Any]:
        nonlocal asked
        results = list(pool.map(counted, groups))
        asked += sum(count for _, count in results)
        return [file for file, _ in results]

    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        list(pool.map(len, [()] * 8))  # started, before the time counts
        urls: list[str] = []
        took = seconds(lambda: urls.extend(index_tars(tars, Wanted(), Folder(str(home / "index")), work, tidy=True)))
        again = seconds(lambda: index_tars(tars, Wanted(), Folder(str(home / "index")), work, tidy=True))
    rows = sum(pq.read_metadata(url).num_rows for url in urls)
    size = sum(tar.size for tar in tars)
    print(
        f"index: {3 * rows} entries in {TARS} tars of {size / 2**30:.1f} GiB: {took:.1f} s on 2 cores, "
        f"{asked / 2**20:.0f} MiB read, {len(urls)} files; looked at again {again:.2f} s"
    )


def s3() -> None:
    """Counts requests to the tar alone."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    asked: collections.Counter[str] = collections.Counter()
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["PATH_INFO"].endswith(".tar"):
            asked[environ["REQUEST_METHOD"]] += 1
        return moto(environ, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(sink, "JPEG")
    info = tarfile.TarInfo()
    info.size = S3_BYTES
    body = sink.getvalue().ljust(-(-S3_BYTES // 512) * 512, b"\0")
    with fs.open("bucket/a.tar", "wb") as file:
        for number in range(S3_MEMBERS):
            info.name = f"{number:06d}.jpg"
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + body)
        file.write(bytes(1024))
    asked.clear()
    tars = list_tars("s3://bucket/a.tar")
    tables: list[pa.Table] = []
    took = seconds(lambda: tables.append(read_samples(tars[0], Wanted()).table))
    print(f"s3: index of {len(tables[0])} members of {S3_BYTES} bytes: {asked.total()} requests, {took:.1f} s")
    asked.clear()
    took = seconds(lambda: load(addresses(tables[0]), ("s3",)))
    print(f"s3: its images, {BLOCK_ROWS} a block: {asked.total()} requests, {took:.1f} s")
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="*", choices=("read", "index", "s3"), default=("read", "index", "s3"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "read" in args.only:
            read(args.photos, args.pairs, Path(folder))
        if "index" in args.only:
            index(args.entries, Path(folder))
        if "s3" in args.only:
            s3()


if __name__ == "__main__":
    main()
