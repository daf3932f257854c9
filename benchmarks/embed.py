"""The main job against its bound and against a baseline, all in one run on one machine.

    python benchmarks/embed.py [PHOTOS_FOLDER] [--rows 3000] [--baseline-rows 3000]

Prints: what a photo costs to decode and to encode (each alone), the bound `cores / (decode + encode core-seconds)`, the
rate of `clipray run` from process start to `_table.json` and when running, the time to the first written row, and the
rate of `baseline.py`. ViT-B-32 with seeded random weights; the figures do not depend on the weights' values.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CORES = len(os.sched_getaffinity(0))
PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "photos"
MODEL = {"name": "ViT-B-32", "pretrained": "random", "seed": 0}


def write_manifest(path: Path, photos: Path, rows: int) -> None:
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        sys.exit(f"no photos under {photos}: name a folder of photos")
    uris = [str(files[n % len(files)]) for n in range(rows)]
    pq.write_table(pa.table({"image_id": [f"{n:06d}" for n in range(rows)], "uri": uris}), path)


def decode_core_s(manifest: Path, photos: int = 500) -> float:
    """Core-seconds to fetch, decode and preprocess one photo, on one thread."""
    from clipray.job import Model
    from clipray.models.preprocess import preprocess_of
    from clipray.models.resolve import resolve
    from clipray.pipelines.decode import load_image
    from clipray.pipelines.spec import Limits

    preprocess = preprocess_of(resolve(Model(**MODEL)))
    uris = pq.read_table(manifest)["uri"].to_pylist()[:photos]
    load_image(uris[0], None, Limits(), preprocess)
    start = time.process_time()
    for uri in uris:
        load_image(uri, None, Limits(), preprocess)
    return (time.process_time() - start) / len(uris)


def encode_core_s(seconds: float = 10) -> tuple[float, dict]:
    """Core-seconds to encode one photo, all cores at work, each on batches of its own, as the encoder does it."""
    import numpy as np
    import pyarrow as pa

    from clipray.job import Model
    from clipray.models.image_encoder import ImageEncoder, sample_image
    from clipray.models.resolve import resolve
    from clipray.pipelines.block_encoder import start_encoder
    from clipray.pipelines.spec import ImageSpec, Limits

    spec = ImageSpec(model=resolve(Model(**MODEL)), limits=Limits(), schema=pa.schema([]), threads=CORES)
    networks, encoder = start_encoder(ImageEncoder, spec)
    batch = np.repeat(sample_image(*encoder.image_size)[None], encoder.batch_size, axis=0)

    def work(until: float) -> tuple[int, float]:
        done, start = 0, time.perf_counter()
        while time.perf_counter() < until:
            encoder.encode(batch)
            done += len(batch)
        return done, time.perf_counter() - start

    for warm in (2, seconds):
        until = time.perf_counter() + warm
        found = [future.result() for future in [networks.submit(work, until) for _ in range(CORES)]]
    return sum(spent for _, spent in found) / sum(done for done, _ in found), encoder.facts


def run_clipray(home: Path, manifest: Path, **settings: object) -> dict:
    """`clipray run` as a person would: its own process, from start to `_table.json`."""
    job = {
        "output": str(home / "out"),
        "model": MODEL,
        "steps": [{"embed_images": {"manifest": str(manifest), **settings}}],
    }
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    start = time.time()
    subprocess.run(
        [str(Path(sys.executable).parent / "clipray"), "run", str(home / "job.yaml")], check=True, capture_output=True
    )
    record = json.loads((home / "out" / "images" / "_table.json").read_text())
    end = (home / "out" / "images" / "_table.json").stat().st_mtime
    first = min((home / "out" / "images" / f["name"]).stat().st_mtime for f in record["files"])
    return {
        "total_s": end - start,
        "first_row_s": first - start,
        "running": running_rate(home / "out" / "events.jsonl"),
        "workers": record["workers"],
    }


def running_rate(events: Path) -> float:
    """Rows a second between the first and the last progress event in which an encoder was at work on fresh rows."""
    points = []
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "progress" and 0 < event["encoded"] < event["total"]:
            points.append((datetime.fromisoformat(event["time"]).timestamp(), event["encoded"]))
    (t0, n0), (t1, n1) = points[0], points[-1]
    return (n1 - n0) / (t1 - t0)


def run_baseline(home: Path, manifest: Path) -> float:
    start = time.time()
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("baseline.py")), str(manifest), str(home / "b.npy")],
        check=True,
        capture_output=True,
    )
    return time.time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--baseline-rows", type=int, default=3000)
    parser.add_argument("--decode-in", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        manifest, short = home / "m.parquet", home / "short.parquet"
        write_manifest(manifest, options.photos, options.rows)
        write_manifest(short, options.photos, options.baseline_rows)
        ours = run_clipray(home, manifest, decode_in=options.decode_in)
        decode, (encode, facts) = decode_core_s(manifest), encode_core_s()
        bound = CORES / (decode + encode)
        print(f"{datetime.now():%Y-%m-%d}, {CORES} cores, encoder {facts}")
        print(
            f"decode alone {decode * 1e3:.2f} core-ms, encode alone {encode * 1e3:.2f} core-ms a photo; bound {bound:.1f} photos/s"
        )
        print(
            f"clipray: {options.rows} photos in {ours['total_s']:.1f} s, {options.rows / ours['total_s']:.1f}/s from process start to _table.json"
        )
        print(
            f"clipray when running: {ours['running']:.1f}/s, {ours['running'] / bound:.0%} of the bound; first row written after {ours['first_row_s']:.1f} s"
        )
        if options.baseline_rows:
            theirs = run_baseline(home, short)
            rate = options.baseline_rows / theirs
            print(f"baseline: {options.baseline_rows} photos in {theirs:.1f} s, {rate:.1f}/s from process start")
            print(
                f"clipray is {options.rows / ours['total_s'] / rate:.2f} times as fast, from process start to the end"
            )


if __name__ == "__main__":
    main()
