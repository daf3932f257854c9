"""Peak memory of the driver and of each kind of worker, over a short and a long table: it must not grow.

    python benchmarks/memory.py [PHOTOS_FOLDER] [--rows 1000 20000]

Unique set size (memory that belongs to the process alone: Ray's shared object store is not counted twice), sampled five
times a second, with the built-in model: the peak, and the median of the second half of the run. The encoder's peak is at
its start, when it tries batches.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
import yaml
from embed import PHOTOS, write_manifest

KINDS = {
    "(Encode)": "encoder",
    "_Writer": "writer",
    "_Board": "board",
    "Reader": "reader",
    "_moments_of": "moments",
    "_project_group": "projection",
    "VectorActor": "holder",
    "_Builder": "builder",
    "_filled": "part",
    "_drawn": "sample",
    "ray::": "other workers",
}


TOGETHER = "all of them together"


def kind_of(process: psutil.Process, driver: int) -> str | None:
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    return next((kind for part, kind in KINDS.items() if part in title), None)


def levels(job: Path) -> dict[str, tuple[float, float]]:
    """MiB of the largest process of each kind, and of all together: the peak, and the median of the run's second half."""
    run = subprocess.Popen(
        [str(Path(sys.executable).parent / "clipray"), "run", str(job)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    samples: list[dict[str, float]] = []
    driver = psutil.Process(run.pid)
    while run.poll() is None:
        found: dict[str, float] = defaultdict(float)
        for process in [driver, *driver.children(recursive=True)]:
            try:
                kind = kind_of(process, run.pid)
                if kind:
                    size = process.memory_full_info().uss / 2**20
                    found[kind] = max(found[kind], size)
                    found[TOGETHER] += size
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        samples.append(found)
        time.sleep(0.2)
    if run.returncode:
        sys.exit(f"clipray run failed with {run.returncode}")
    seen = {kind: [sample[kind] for sample in samples if kind in sample] for kind in set().union(*samples)}
    return {kind: (max(sizes), statistics.median(sizes[len(sizes) // 2 :])) for kind, sizes in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 20000])
    options = parser.parse_args()
    table = {}
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            write_manifest(home / "m.parquet", options.photos, rows)
            job = {
                "output": str(home / "out"),
                "model": {"name": "demo"},
                "steps": [{"embed_images": {"manifest": str(home / "m.parquet")}}],
            }
            (home / "job.yaml").write_text(yaml.safe_dump(job))
            start = time.time()
            table[rows] = levels(home / "job.yaml")
            print(f"{rows} rows in {time.time() - start:.0f} s on {len(os.sched_getaffinity(0))} cores", flush=True)
    for kind in sorted({kind for peak in table.values() for kind in peak}):
        figures = [(rows, found[kind]) for rows, found in table.items() if kind in found]
        print(f"{kind:14s} " + "  ".join(f"{n:>6} rows: peak {p:5.0f}, later {m:5.0f} MiB" for n, (p, m) in figures))


if __name__ == "__main__":
    main()
