"""The step `index` against autofaiss, from Parquet and from .npy: seconds, memory and recall of what they build.

    python benchmarks/index.py [--rows 1000000] [--columns 256] [--autofaiss PYTHON]

Clustered random vectors of unit length, cosine, `type: auto`, recall target 0.95. autofaiss runs in an environment of its
own, whose Python `--autofaiss` names, with 4 GB allowed; its recall is measured here, with new rows, at the effort that
it chose. Seconds of clipray are of the step, without the start of Ray; of autofaiss without its import.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import psutil
from reduce_and_cluster import run, write_vectors

from clipray.analysis.recall import Queries, nearest_exactly, recall_at

AUTOFAISS = """
import json, sys, time
from autofaiss import build_index
start = time.time()
build_index(embeddings=sys.argv[1], index_path=sys.argv[2], index_infos_path=sys.argv[3], max_index_memory_usage="4GB",
            current_memory_available="12GB", metric_type="ip", file_format="npy", verbose=40)
print(json.dumps({"seconds": time.time() - start}))
"""


def clustered(rows: int, columns: int, groups: int = 5_000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(groups, columns)).astype(np.float32)
    x = np.empty((rows, columns), np.float32)
    for start in range(0, rows, 100_000):
        block = x[start : start + 100_000]
        block[:] = centres[rng.integers(0, groups, len(block))] + rng.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return x


def run_autofaiss(python: str, x: np.ndarray, new: np.ndarray, home: Path) -> None:
    (home / "npy").mkdir()
    np.save(home / "npy" / "x.npy", x)
    command = [python, "-c", AUTOFAISS, str(home / "npy"), str(home / "af.index"), str(home / "af.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, watched = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_full_info().uss / 2**20)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            break
        time.sleep(0.2)
    seconds = json.loads(process.stdout.read().splitlines()[-1])["seconds"]
    facts = json.loads((home / "af.json").read_text())
    index = faiss.read_index(str(home / "af.index"))
    recall = recall_at(index, Queries(new, nearest_exactly(new, x, "cosine", np.arange(len(x)), 10)), "cosine", 10)
    kind = {key: facts.get(key) for key in ("index_key", "index_param")}
    print(f"autofaiss: {seconds:.1f} s, {peak:.0f} MiB, recall@10 {recall:.3f} at {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--autofaiss", help="Python of an environment that has autofaiss.")
    options = parser.parse_args()
    x, new = np.split(clustered(options.rows + 1_000, options.columns), [options.rows])
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_vectors(home / "v.parquet", x)
        source = {"path": str(home / "v.parquet"), "column": "vector"}
        record, found = run(home, {"index": {"name": "index", "input": source}})
        sizes = ", ".join(f"{kind} {peak:.0f}" for kind, (peak, _) in sorted(found.items()))
        print(f"clipray: {record['seconds']} s, {record['figures']}; MiB at the peak: {sizes}", flush=True)
        if options.autofaiss:
            run_autofaiss(options.autofaiss, x, new, home)


if __name__ == "__main__":
    sys.exit(main())
