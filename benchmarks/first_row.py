"""Seconds from process start to the first row on disk: this checkout against others, in alternating runs.

    python benchmarks/first_row.py [PHOTOS_FOLDER] --against CHECKOUT [--against CHECKOUT] [--rounds 5]

Each round runs each checkout once over 250 photos (ViT-B-32 with seeded random weights) and once over the demo's
world, and stops it at its first row. To make a checkout: `git worktree add ../before COMMIT`. All of them run in this
environment. Prints the medians, and the median over the rounds of each checkout's time over this one's.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from embed import MODEL, PHOTOS, write_manifest

HERE = Path(__file__).resolve().parent.parent
ROWS = 250
LATE_S = 300.0
INPUTS = ("photos", "demo")


def first_row_s(checkout: Path, arguments: Sequence[str], table: Path) -> float:
    """Start `clipray` of a checkout, wait for the first shard of its table, and stop it."""
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "clipray", *arguments],
            cwd=table.parent.parent,
            env=env,
            stdout=output,
            stderr=output,
        )
        try:
            while not any(table.glob("*.parquet")):
                if process.poll() is not None or time.monotonic() - start > LATE_S:
                    output.seek(0)
                    sys.exit(f"{checkout}: no row from `clipray {' '.join(arguments)}`\n{output.read()}")
                time.sleep(0.02)
            return time.monotonic() - start
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def measure(checkout: Path, name: str, manifest: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if name == "demo":
            return first_row_s(checkout, ["demo", str(home / "demo")], home / "demo" / "images")
        steps = [{"embed_images": {"manifest": str(manifest)}}]
        (home / "job.yaml").write_text(yaml.safe_dump({"output": str(home / "out"), "model": MODEL, "steps": steps}))
        return first_row_s(checkout, ["run", str(home / "job.yaml")], home / "out" / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--against", type=Path, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = [HERE, *(path.resolve() for path in options.against)]
    seconds: dict[tuple[str, Path], list[float]] = {(name, path): [] for name in INPUTS for path in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        write_manifest(manifest, options.photos.resolve(), ROWS)
        for turn in range(options.rounds):
            for checkout in checkouts[turn % len(checkouts) :] + checkouts[: turn % len(checkouts)]:
                for name in INPUTS:
                    seconds[name, checkout].append(measure(checkout, name, manifest))
                    print(f"{name:7} {seconds[name, checkout][-1]:6.2f} s  {checkout}", flush=True)
    for (name, checkout), times in seconds.items():
        ratio = statistics.median(other / ours for other, ours in zip(times, seconds[name, HERE], strict=True))
        print(f"{name:7} median {statistics.median(times):6.2f} s, {ratio:.3f} of this checkout's  {checkout}")


if __name__ == "__main__":
    main()
