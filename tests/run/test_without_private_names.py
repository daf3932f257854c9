"""A run on a Ray that has none of the private names: slower, and right; each alone does no harm either."""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from support import draw_pictures, write_job, write_traps

from clipray import tables
from clipray.engine import ray_internals
from clipray.engine.connect import cluster_now
from clipray.engine.ray_internals import (
    NAMES,
    finished_blocks,
    nodes_to_come,
    quiet_raylet,
    without_data_actors,
    without_driver_path,
    without_helpers,
)
from clipray.inputs.make_manifest import make_manifest

RENAMED = """
import json, sys
from clipray import run
from clipray.engine import ray_internals
ray_internals.NAMES = json.loads(sys.argv[2])
run(sys.argv[1])
"""


def gone(purpose: str) -> dict[str, str]:
    """The names of a Ray that calls one of them otherwise."""
    return {**NAMES, purpose: f"{NAMES[purpose]}_2"}


def test_a_run_without_any_of_the_names(tmp_path: Path, tiny_model: str) -> None:
    """With relative paths, in a directory whose modules nothing may import; runs of the kill chain have all names."""
    draw_pictures(tmp_path / "images", 30)
    make_manifest(str(tmp_path / "images"), str(tmp_path / "m.parquet"))
    write_job(tmp_path / "job.yaml", "m.parquet", tiny_model, output="out", batch_size=8)
    imported = write_traps(tmp_path)
    names = {purpose: f"{name}_2" for purpose, name in NAMES.items()}
    command = [sys.executable, "-P", "-c", RENAMED, "job.yaml", json.dumps(names)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not imported.exists(), imported.read_text()
    assert len(tables.read_table(str(tmp_path / "out" / "images"), ["image_id"])) == 30


@pytest.mark.usefixtures("ray_here")
@pytest.mark.parametrize("purpose", [None, "blocks", "references", "sizes"])
def test_blocks(purpose: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if purpose:
        monkeypatch.setattr(ray_internals, "NAMES", gone(purpose))
    data = ray.data.from_arrow([pa.table({"n": [1, 2, 3]}), pa.table({"n": [4]})]).map_batches(lambda batch: batch)
    blocks = list(finished_blocks(data))
    assert sorted(n for ref, _, _ in blocks for n in ray.get(ref)["n"].to_pylist()) == [1, 2, 3, 4]
    assert sorted(rows for _, rows, _ in blocks if rows) == [1, 3]
    assert all(size_bytes > 0 for _, rows, size_bytes in blocks if rows)


@pytest.mark.usefixtures("ray_here")
def test_nodes_to_come_are_none_without_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nodes_to_come() == []  # no autoscaler here
    monkeypatch.setattr(ray_internals, "NAMES", gone("nodes to come"))
    assert nodes_to_come() == []
    assert cluster_now(local=False).growth == ()


REPLACED = {
    "helpers": without_helpers,
    "full agent": without_helpers,
    "metrics": without_data_actors,
    "shares": without_data_actors,
    "raylet's errors": quiet_raylet,
    "driver path": lambda: without_driver_path({}),
}


def parts(purpose: str) -> list[Any]:
    """What Ray has under the names of a purpose."""
    module, name, *attributes = NAMES[purpose].split()
    owner = getattr(importlib.import_module(module), name)
    return [vars(owner)[attribute] for attribute in attributes]


@pytest.mark.parametrize("purpose", REPLACED)
def test_what_is_replaced_is_as_before_afterwards(purpose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts(purpose)
    with contextlib.suppress(KeyError), REPLACED[purpose]():
        assert all(now is not then for now, then in zip(parts(purpose), before, strict=True))
        raise KeyError
    assert parts(purpose) == before
    monkeypatch.setattr(ray_internals, "NAMES", gone(purpose))  # where one name is not there, the others stay
    with REPLACED[purpose]():
        assert parts(purpose) == before


def test_without_the_name_workers_get_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_internals, "NAMES", gone("driver path"))
    options = {"num_cpus": 2, "runtime_env": {"env_vars": {"A": "1"}}}
    with without_driver_path(options) as safe:
        folder = Path(safe["runtime_env"].pop("working_dir"))
        assert safe == options
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    submitted = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}  # which Ray puts on the path itself
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    with without_driver_path(options) as safe:
        assert safe == options
