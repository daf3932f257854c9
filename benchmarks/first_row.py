"""Seconds from process start to the first row on disk: this checkout against others, in alternating runs.

    python benchmarks/first_row.py [PHOTOS_FOLDER] --against CHECKOUT [--against CHECKOUT] [--rounds 5]

Each round runs each checkout once over 250 photos (ViT-B-32 with seeded random weights) and once over the demo's
world, and stops it at its first row. To make a checkout: `git worktree add ../before COMMIT`. All of them run in this
environment. Prints the medians, and the median over the rounds of each checkout's figures over this one's. Core-seconds
are of all processes of the run up to that row: they hardly depend on what else the machine does.
"""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from embed import MODEL, PHOTOS, write_manifest

HERE = Path(__file__).resolve().parent.parent
ROWS = 250
LATE_S = 300.0
INPUTS = ("photos", "demo")


def first_row(checkout: Path, arguments: Sequence[str], table: Path) -> tuple[float, float]:
    """Start `clipray` of a checkout, wait for the first shard of its table, and stop it: (seconds, core-seconds)."""
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
            return time.monotonic() - start, core_s(psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()


def core_s(process: psutil.Process) -> float:
    """What a process and its descendants, also those that have ended, have used of the cores."""
    total = 0.0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(checkout: Path, name: str, manifest: Path) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        if name == "demo":
            return first_row(checkout, ["demo", str(home / "demo")], home / "demo" / "images")
        steps = [{"embed_images": {"manifest": str(manifest)}}]
        (home / "job.yaml").write_text(yaml.safe_dump({"output": str(home / "out"), "model": MODEL, "steps": steps}))
        return first_row(checkout, ["run", str(home / "job.yaml")], home / "out" / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--against", type=Path, action="append", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = [HERE, *(path.resolve() for path in options.against)]
    figures: dict[tuple[str, Path], list[tuple[float, float]]] = {(n, path): [] for n in INPUTS for path in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        write_manifest(manifest, options.photos.resolve(), ROWS)
        for turn in range(options.rounds):
            for checkout in checkouts[turn % len(checkouts) :] + checkouts[: turn % len(checkouts)]:
                for name in INPUTS:
                    figures[name, checkout].append(measure(checkout, name, manifest))
                    wall, cores = figures[name, checkout][-1]
                    print(f"{name:7} {wall:6.2f} s, {cores:6.2f} core-s  {checkout}", flush=True)
    for (name, checkout), runs in figures.items():
        wall, cores = (statistics.median(run[n] for run in runs) for n in (0, 1))
        ours = figures[name, HERE]
        ratios = (statistics.median(run[n] / our[n] for run, our in zip(runs, ours, strict=True)) for n in (0, 1))
        print(
            "{:7} {:6.2f} s, {:6.2f} core-s; {:.3f} and {:.3f} of this checkout's  {}".format(
                name, wall, cores, *ratios, checkout
            )
        )


if __name__ == "__main__":
    main()
