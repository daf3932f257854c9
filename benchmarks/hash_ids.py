"""Nanoseconds an id of hashing a million ids: xxHash64 by polars-hash, as clipray does it, and SipHash by pandas.

    python benchmarks/hash_ids.py [--rows 1000000] [--rounds 7]

The two take turns; the least of the rounds counts. pandas is Ray's own dependency, not clipray's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa

from clipray.inputs.key_index import hash_strings


def by_pandas(ids: pa.ChunkedArray) -> np.ndarray:
    return pd.util.hash_array(np.asarray(ids.to_numpy(), object), hash_key="clipray-00000000", categorize=False)


def by_polars_hash(ids: pa.ChunkedArray) -> np.ndarray:
    return hash_strings(ids, 1)


def ns_per_row(hash_ids: Callable[[pa.ChunkedArray], np.ndarray], ids: pa.ChunkedArray) -> float:
    began = time.perf_counter()
    hash_ids(ids)
    return (time.perf_counter() - began) * 1e9 / len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    ids = pa.chunked_array([[f"folder/{n // 1000:05d}/image-{n:09d}.jpg" for n in range(options.rows)]])
    ways = (by_polars_hash, by_pandas)
    rounds = [[ns_per_row(way, ids) for way in ways] for _ in range(options.rounds)]
    for way, times in zip(ways, zip(*rounds, strict=True), strict=True):
        print(f"{way.__name__}: {min(times):.0f} ns a row")


if __name__ == "__main__":
    main()
