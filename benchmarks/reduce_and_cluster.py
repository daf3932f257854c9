"""The steps `reduce` and `cluster` from Parquet to Parquet, over a short and a long table: seconds and memory.

    python benchmarks/reduce_and_cluster.py [--rows 100000 1000000] [--columns 512] [--clusters 1000] [--iterations 5]

CLIP-like vectors (`kmeans.py` makes them). Principal components (100, whitened), then K-means of the vectors held in
memory, and once more with `hold: none`, which reads them again at each iteration. What `reduce` and `hold: none` need
must not grow with the rows. Seconds of a step are from its start to its `_table.json`; Ray's start is not in them.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from kmeans import clip_like
from memory import levels

GROUP_ROWS = 16_384  # as in our tables


def write_vectors(path: Path, x: np.ndarray, ids: Sequence[int] | None = None) -> None:
    kind = pa.list_(pa.field("element", pa.float32(), nullable=False), x.shape[1])
    schema = pa.schema([pa.field("image_id", pa.string(), False), pa.field("vector", kind, False)])
    options = {"use_dictionary": False, "compression": "zstd", "use_byte_stream_split": ["vector.list.element"]}
    numbers = range(len(x)) if ids is None else ids
    with pq.ParquetWriter(path, schema, **options) as writer:
        for start in range(0, len(x), GROUP_ROWS):
            rows = x[start : start + GROUP_ROWS]
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), type=kind)
            names = pa.array([f"v{n:08d}" for n in numbers[start : start + len(rows)]])
            writer.write_table(pa.table([names, vectors], schema=schema), row_group_size=GROUP_ROWS)


def run(home: Path, step: dict) -> tuple[dict, dict[str, tuple[float, float]]]:
    """The record of the step's table, and the memory of each kind of process."""
    (settings,) = step.values()
    job = {"output": str(home / "out"), "steps": [step]}
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    found = levels(home / "job.yaml")
    return json.loads((home / "out" / settings["name"] / "_table.json").read_text()), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=5)
    options = parser.parse_args()
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            write_vectors(home / "v.parquet", clip_like(rows, options.columns, 2 * options.clusters))
            source = {"path": str(home / "v.parquet"), "column": "vector"}
            clusters = {
                "input": source,
                "clusters": options.clusters,
                "max_iterations": options.iterations,
                "tolerance": 0,
            }
            for step in (
                {"reduce": {"name": "reduced", "input": source, "components": 100, "whiten": True}},
                {"cluster": {"name": "held", "hold": "float32", **clusters}},
                {"cluster": {"name": "read_again", "hold": "none", **clusters}},
            ):
                record, found = run(home, step)
                figures = {
                    k: v for k, v in record["figures"].items() if k.endswith("_s") or k in ("inertia", "precision")
                }
                sizes = ", ".join(f"{kind} {peak:.0f}" for kind, (peak, _) in sorted(found.items()))
                (name,) = (settings["name"] for settings in step.values())
                print(
                    f"{rows} x {options.columns}, {name}: {record['seconds']} s {figures}; MiB at the peak: {sizes}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
