"""A cluster of several nodes on this machine: who works where, what a dead node loses, what a new one gets.

Its "GPUs" are names only: the networks run on CPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run.test_embed import vectors
from run.test_kill import ENVIRONMENT, wait_for_rows
from support import CLIPRAY, PYTHONPATH, ForkedWorkers, write_job

from clipray.engine.connect import without_helpers

ROWS = 600
GPU, CPU = {"tier": "gpu"}, {"tier": "cpu"}
AS_NEEDED = {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}  # workers start when they work
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


class Nodes:
    """A cluster without a job server, and its nodes by name."""

    def __init__(self, folder: Path, hold: Path, forked_workers: ForkedWorkers) -> None:
        from ray.cluster_utils import Cluster

        self._forked_workers = forked_workers
        head = {"num_cpus": 1, "labels": {"tier": "head"}, "temp_dir": str(folder), "_system_config": QUICK}
        with without_helpers(), forked_workers():
            self._cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
        self.address = self._cluster.address
        self.hold = hold  # while this file is there, pictures come very slowly; see `testfs`
        self._nodes: dict[str, Any] = {}

    def add(self, name: str, **offered: Any) -> None:
        with without_helpers(), self._forked_workers():
            self._nodes[name] = self._cluster.add_node(**offered)

    def ids(self, name: str) -> str:
        return str(self._nodes[name].node_id)

    def kill(self, name: str) -> None:
        self._cluster.remove_node(self._nodes[name], allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, forked_workers: ForkedWorkers) -> Iterator[Nodes]:
    """A head, a node to decode and a node with a GPU."""
    # The tests' own Ray, where it runs already, has switched tokens on for all that this process starts.
    hold = tmp_path_factory.mktemp("nodes") / "hold"
    ours = {**AS_NEEDED, "PYTHONPATH": PYTHONPATH, "RAY_AUTH_MODE": "disabled", "TESTFS_HOLD": str(hold)}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    started = Nodes(Path("/tmp") / f"clipray-nodes-{os.getpid()}", hold, forked_workers)  # a socket's path is short
    try:
        started.add("decode", num_cpus=2, labels=CPU)
        started.add("gpu", num_cpus=1, num_gpus=1, labels=GPU)
        yield started
    finally:
        started.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Every picture stands twice under another id, behind a slow line."""
    path = tmp_path_factory.mktemp("slow") / "m.parquet"
    files = sorted(pictures.rglob("*.jpg"))
    uris = [f"slow://{files[n % len(files)]}" for n in range(ROWS)]
    pq.write_table(pa.table({"image_id": [f"{n:05d}" for n in range(ROWS)], "uri": uris}), path)
    return path


def job_for(home: Path, manifest: Path, model: str, **settings: Any) -> str:
    home.mkdir(exist_ok=True)
    fixed = {"rows_per_block": 16, "flush_s": 0.2, "batch_size": 16, "schemes": ["slow"], "device": "cpu"}
    return write_job(home / "job.yaml", manifest, model, **fixed, **settings)


def clipray(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLIPRAY, *words], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)


def rows_by_node(home: Path) -> dict[str, dict[str, int]]:
    """Stage -> node -> rows, as the run's last pass says it of the whole run."""
    events = [json.loads(line) for line in (home / "out" / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "pass_ended"][-1]["rows_by_node"]


def test_a_plan_says_what_the_cluster_has(nodes: Nodes, manifest: Path, tiny_model: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, manifest, tiny_model, gpus_per_actor=0.5, encode_on=GPU, decode_on=CPU)
    done = clipray("plan", job, "--address", nodes.address)
    assert (
        "cluster: 3 nodes: 1 x (1 CPU, 1 GPU, tier=gpu), 1 x (1 CPU, tier=head), 1 x (2 CPUs, tier=cpu)" in done.stdout
    )
    assert (
        "2 encoders with 1 thread, 0.25 CPU and 0.5 GPU each on nodes with tier=gpu; "
        "decoding in CPU tasks of 1 CPU on nodes with tier=cpu" in done.stdout
    )


def test_more_gpus_than_there_are(nodes: Nodes, manifest: Path, tiny_model: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, manifest, tiny_model, gpus_per_actor=4)
    done = clipray("run", job, "--address", nodes.address)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "clipray: gpus_per_actor=4, but no node has so much: the cluster has 3 nodes: 1 x (1 CPU, 1 GPU"
    )


def test_two_models_share_a_gpu(nodes: Nodes, manifest: Path, tiny_model: str, tmp_path: Path) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(manifest).slice(0, 32), few)
    settings = {"gpus_per_actor": 0.5, "actors": 1, "encode_on": GPU, "decode_on": CPU}
    jobs = [job_for(tmp_path / name, few, name, **settings) for name in ("demo", "demo-rn")]
    running = [
        subprocess.Popen([CLIPRAY, "run", job, "--address", nodes.address], env=ENVIRONMENT, stderr=subprocess.PIPE)
        for job in jobs
    ]
    for process in running:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    for name in ("demo", "demo-rn"):
        assert len(vectors(tmp_path / name / "out" / "images")) == 32
        worked = rows_by_node(tmp_path / name)
        assert worked["decode"] == {nodes.ids("decode"): 32}
        assert worked["encode"] == {nodes.ids("gpu"): 32}


def test_nodes_come_and_go(nodes: Nodes, manifest: Path, tiny_model: str, pictures: Path, tmp_path: Path) -> None:
    job = job_for(tmp_path, manifest, tiny_model, gpus_per_actor=1, actors=[1, 2], encode_on=GPU, decode_on=CPU)
    nodes.hold.touch()  # at once: rows are decoded while the encoder starts
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [CLIPRAY, "run", job, "--address", nodes.address], env=ENVIRONMENT, stdout=log, stderr=log, text=True
        )
    wait_for_rows(job, 1, process)
    nodes.add("new-decode", num_cpus=2, labels=CPU)
    nodes.add("new-gpu", num_cpus=1, num_gpus=1, labels=GPU)
    nodes.kill("decode")
    nodes.kill("gpu")
    nodes.hold.unlink()
    assert process.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    found = vectors(tmp_path / "out" / "images")
    assert sorted(found) == [f"{n:05d}" for n in range(ROWS)]
    for n in range(300):  # the same picture, whoever encoded it, and whenever
        assert np.abs(found[f"{n:05d}"] - found[f"{n + 300:05d}"]).max() <= 1e-6
    worked = rows_by_node(tmp_path)
    assert worked["decode"].keys() == {nodes.ids("decode"), nodes.ids("new-decode")}
    assert worked["encode"].keys() == {nodes.ids("gpu"), nodes.ids("new-gpu")}
