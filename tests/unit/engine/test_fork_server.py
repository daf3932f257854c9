"""Workers that are forked: each has its own arguments, environment and ids, and a Python stands in where nobody forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clipray.engine import fork_server

SCRIPT = """
import json, os, sys
import ray
facts = [os.getpid(), sys.argv[1:], os.environ["MINE"], os.getcwd(), ray.ObjectRef.from_random().hex(), "ray.data" in sys.modules]
print("said")
with open(sys.argv[1] + ".tmp", "w") as file:
    json.dump(facts, file)
os.rename(sys.argv[1] + ".tmp", sys.argv[1])
"""


@pytest.fixture
def worker(tmp_path: Path) -> str:
    (tmp_path / fork_server.WORKER).write_text(SCRIPT)
    return str(tmp_path / fork_server.WORKER)


def facts(path: Path) -> list[Any]:
    """What a worker has written, once it has."""
    for _ in range(1_200):
        if path.exists():
            return list(json.loads(path.read_text()))
        time.sleep(0.05)
    raise AssertionError(f"no worker wrote {path}")


def test_each_worker_is_a_process_of_its_own(worker: str, tmp_path: Path) -> None:
    """Ray makes ids of random numbers, whose state a fork copies: two workers that draw the same ids end each other."""
    outs = [tmp_path / f"{n}.json" for n in range(4)]
    with fork_server.forking_python(os.environ, ahead=[]) as python:
        for out in outs:
            environment = {**os.environ, "MINE": out.name}
            words = [python, "-u", worker, str(out), "more"]
            assert subprocess.run(words, env=environment, cwd=tmp_path, check=True, timeout=60).returncode == 0
        pids, arguments, mine, folders, ids, imported = zip(*map(facts, outs), strict=True)
    assert len(set(pids)) == len(set(ids)) == len(outs)
    assert list(arguments) == [[str(out), "more"] for out in outs]
    assert list(mine) == [out.name for out in outs]
    assert set(folders) == {str(tmp_path)}
    assert all(imported)  # before the fork: the script imports only Ray itself


def test_other_scripts_are_run_by_the_python_itself() -> None:
    with fork_server.forking_python(os.environ, ahead=[]) as python:
        done = subprocess.run([python, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "42\n"


def test_where_nobody_forks_a_worker_starts_by_itself(worker: str, tmp_path: Path) -> None:
    words = [sys.executable, fork_server.__file__, "ask", str(tmp_path / "nobody"), worker, str(tmp_path / "out")]
    done = subprocess.run(
        words, env={**os.environ, "MINE": "x"}, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "said\n"
    assert facts(tmp_path / "out")[2] == "x"
