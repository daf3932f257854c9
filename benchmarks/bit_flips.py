"""Flips random bits in the files of a finished run, one at a time, and counts how many `clipray verify` notices.

    python benchmarks/bit_flips.py RUN [--flips 1000] [--seed 0]

Works on a copy. Parquet, FAISS and JSON files take part; `events.jsonl`, HTML and images do not.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from clipray.runner.verify import check_table, verify
from clipray.storage.folder import Folder
from clipray.tables import DAMAGED

SUFFIXES = (".parquet", ".faiss", ".lists", ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--flips", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        run = Path(home) / "run"
        shutil.copytree(options.run, run)
        tables = [check.name for check in verify(run) if check.state == "whole"]
        files = sorted(path for name in tables for path in (run / name).iterdir() if path.suffix in SUFFIXES)
        flip(run, files, options.flips, np.random.default_rng(options.seed))


def flip(run: Path, files: list[Path], flips: int, rng: np.random.Generator) -> None:
    """Each time in a file drawn at random, at a bit drawn at random."""
    drawn, noticed = Counter[str](), Counter[str]()
    for _ in range(flips):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        bit = int(rng.integers(8 * len(whole)))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        name = file.parent.relative_to(run).as_posix()
        check = check_table(Folder(str(file.parent)), name)
        drawn[file.suffix] += 1
        if check is not None and any(broken.file == file.name for broken in check.broken):
            noticed[file.suffix] += 1
        else:
            print(f"not noticed: bit {bit} of {name}/{file.name}")
        file.write_bytes(whole)
        (file.parent / DAMAGED).unlink(missing_ok=True)
    for suffix, count in sorted(drawn.items()):
        print(f"{suffix}: {noticed[suffix]} of {count} flips noticed")
    print(f"{sum(noticed.values())} of {flips} flips noticed, in {len(files)} files")


if __name__ == "__main__":
    main()
