"""How the stream scales with its encoders, where cores are short: encoders that wait instead of computing.

    python benchmarks/scaling.py [--encoders 1 2 4 8 16] [--ms-a-row 4] [--seconds 40]

All but the network is real: reading, blocks, Ray's scheduling, writing, taking stock, on two nodes (in name: both are this
machine), so that rows pass the driver as references, as on a cluster. An encoder waits `--ms-a-row` for each row and
returns a random vector. The rate is that between a third and nine tenths of the rows; linear is what encoders would do
that never wait for anything else. The driver's processor time and memory are those of this process in that time.
"""

import argparse
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import clipray
from clipray.engine import stream
from clipray.pipelines.spec import Report


class Waiting:
    """Stands for an encoder of pictures; waits for each row."""

    def __init__(self, settings: Any, report: Report) -> None:
        self._width, self._report = settings.schema.field("clip").type.list_size, report
        self._network = threading.Lock()  # two blocks are under way at once, and one of them is encoded
        self._ms = float(os.environ["CLIPRAY_WAIT_MS"])
        report({"worker": {"precision": "fp32", "pid": os.getpid(), "host": socket.gethostname(), "threads": 1}})

    def __call__(self, block: pa.Table) -> pa.Table:
        rows, began = len(block), time.perf_counter()
        with self._network:
            time.sleep(self._ms / 1000 * rows)
        vectors = np.random.default_rng(0).random((rows, self._width), np.float32)
        kind = pa.list_(pa.field("element", pa.float32(), nullable=False), self._width)
        self._report({"stage": "encode", "rows": rows, "seconds": time.perf_counter() - began})
        return pa.table(
            {
                "image_id": block["image_id"],
                "uri": block["uri"],
                "height": pa.array([64] * rows, pa.int32()),
                "width": pa.array([64] * rows, pa.int32()),
                "clip": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=kind),
                **{name: pa.nulls(rows, pa.string()) for name in ("stage", "reason", "message")},
            }
        )


def measure(encoders: int, rows: int, home: Path) -> dict[str, float]:
    """One job from its start to its `_table.json`."""
    ids = pa.array([f"v{n:08d}" for n in range(rows)])
    pq.write_table(pa.table({"image_id": ids, "uri": ids}), home / "m.parquet", row_group_size=16_384)
    step = {"manifest": str(home / "m.parquet"), "actors": encoders, "cpus_per_actor": 1, "decode_in": "actors"}
    job = {
        "output": str(home / "out"),
        "model": {"name": "demo", "precision": "fp32"},
        "steps": [{"embed_images": step}],
    }
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    me, seen = psutil.Process(), []

    def watch(shot: Any) -> None:
        seen.append((time.monotonic(), shot.encoded, sum(me.cpu_times()[:2]), me.memory_info().rss / 2**20))

    (report,) = clipray.run(str(home / "job.yaml"), watch=watch)
    assert report.rows == rows
    middle = [look for look in seen if rows / 3 <= look[1] <= 0.9 * rows]
    (t0, n0, cpu0, _), (t1, n1, cpu1, memory) = middle[0], middle[-1]
    return {"rate": (n1 - n0) / (t1 - t0), "cores": (cpu1 - cpu0) / (t1 - t0), "ms": 1000 * (cpu1 - cpu0) / (n1 - n0), "memory": memory}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoders", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--ms-a-row", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=40.0)
    options = parser.parse_args()
    os.environ["CLIPRAY_WAIT_MS"] = str(options.ms_a_row)  # inherited by the nodes and their workers
    from ray.cluster_utils import Cluster

    from clipray.engine.connect import connected

    stream.Encode = Waiting  # type: ignore[assignment,misc]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    cluster.add_node(num_cpus=2 * max(options.encoders))
    alone = 1000 / options.ms_a_row
    with connected(cluster.address):
        print("encoders  rows/s  of linear  driver: cores  ms a 1,000 rows  MiB")
        for encoders in options.encoders:
            with tempfile.TemporaryDirectory() as folder:
                found = measure(encoders, int(options.seconds * alone * encoders), Path(folder))
            share = found["rate"] / (alone * encoders)
            print(f"{encoders:8} {found['rate']:7.0f} {share:10.1%} {found['cores']:14.2f} {1000 * found['ms']:16.0f} {found['memory']:5.0f}", flush=True)  # fmt: skip
    cluster.shutdown()


if __name__ == "__main__":
    main()
