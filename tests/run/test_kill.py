"""Kill the driver, a worker, the raylet, in the middle; run again; every row is there, once, with the same vector."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from run.test_embed import reasons, vectors
from support import CLIPRAY, PYTHONPATH, write_job, write_traps

import clipray
from clipray.errors import RunError
from clipray.inputs.make_manifest import make_manifest
from clipray.tables import read_table

ROWS, MORE = 800, 50
TEXTS = [f"a {size} circle number {n}" for n in range(1_500) for size in ("small", "large")]
TABLES = (
    ("images", "image_id", "clip"),
    ("regions", "region_id", "local"),
    ("texts", "text_id", "embedding"),
    ("rejects/regions", "message", None),
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": PYTHONPATH}


def job_for(home: Path, prefix: str, pictures: Path, model: str) -> str:
    """A job of pictures with regions, each picture under several ids, and of texts; returns the path of its file."""
    files, rng = sorted(pictures.rglob("*.jpg")), np.random.default_rng(3)
    corners = rng.uniform(-5, 40, (ROWS, 2, 2))  # some boxes lie outside: they are refused
    boxes = [np.concatenate([c, c + 12], 1)[: n % 3].tolist() for n, c in enumerate(corners)]
    rows = [{"image_id": f"{n:05d}", "uri": f"{prefix}{files[n % len(files)]}", "boxes": boxes[n]} for n in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), home / "m.parquet")
    pq.write_table(pa.table({"text_id": [f"{n:05d}" for n in range(len(TEXTS))], "text": TEXTS}), home / "t.parquet")
    features = {"clip": {"layer": "output"}, "local": {"layer": "tokens", "pooling": "rmac", "regions": True}}
    often = {"flush_s": 0.1, "batch_size": 16, "rows_per_block": 16}
    embed_images = {"manifest": str(home / "m.parquet"), "features": features, "schemes": ["slow", "file"], **often}
    steps = [{"embed_images": embed_images}, {"embed_texts": {"manifest": str(home / "t.parquet"), **often}}]
    job = {"output": str(home / "out"), "model": {"name": model, "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    return str(home / "job.yaml")


def start(job: str) -> subprocess.Popen[str]:
    log = open(Path(job).with_suffix(f".{time.time():.0f}.log"), "w")  # noqa: SIM115
    return subprocess.Popen(
        [CLIPRAY, "run", job],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(job).parent,
        env={**ENVIRONMENT, "TESTFS_HOLD": str(hold(job))},
        start_new_session=True,
    )


def hold(job: str) -> Path:
    """While this file is there, pictures of `start`ed runs come very slowly: a run waits to be killed half-way."""
    return Path(job).with_name("hold")


def start_and_wait(job: str, more: int, table: str = "images") -> subprocess.Popen[str]:
    """A run, once it has written `more` rows; begun again where a busy machine keeps Ray from starting in its 30 s."""
    for _ in range(2):
        process, wanted = start(job), rows_on_disk(job, table) + more
        with contextlib.suppress(RayDidNotStart):
            wait_for_rows(job, wanted, process, table=table)
            return process
    raise AssertionError("Ray did not start, twice")


class RayDidNotStart(AssertionError):
    """As the run's last line says."""


def rows_on_disk(job: str, table: str = "images") -> int:
    total = 0
    for shard in (Path(job).parent / "out" / table).glob("*.parquet"):
        with contextlib.suppress(OSError):
            total += rows_of(shard, shard.stat().st_mtime_ns)
    return total


@functools.cache
def rows_of(shard: Path, _: int) -> int:
    """Remembered: who waits for rows looks often, and takes no time from those that make them."""
    return pq.read_metadata(shard).num_rows


def wait_for_rows(
    job: str, rows: int, process: subprocess.Popen[str], timeout_s: float = 120, table: str = "images"
) -> None:
    """Until so many rows are written; from then on the run is held back."""
    end = time.monotonic() + timeout_s
    hold(job).unlink(missing_ok=True)
    while rows_on_disk(job, table) < rows:
        if process.poll() is not None:
            said = [log.read_text() for log in Path(job).parent.glob("job.*.log")]
            late = any("Ray did not start within its 30 s" in text for text in said)
            raise RayDidNotStart if late else AssertionError("the run ended before it could be killed")
        assert time.monotonic() < end, f"only {rows_on_disk(job, table)} rows after {timeout_s} s"
        time.sleep(0.1)
    hold(job).touch()


def children(process: subprocess.Popen[str], wanted: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if wanted(child):
                found.append(child)
    return found


def is_encoder(process: psutil.Process) -> bool:
    return any("(Encode)" in part for part in process.cmdline())


def is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("Agent" in part or "agent" in os.path.basename(part) for part in process.cmdline())
    return False


def is_raylet(process: psutil.Process) -> bool:
    return process.name() == "raylet"


def is_spared(process: psutil.Process) -> bool:
    """One of the helpers that Ray starts elsewhere, see `ray_internals.without_helpers`."""
    return any(part.endswith(("dashboard.py", "monitor.py")) for part in process.cmdline())


@contextlib.contextmanager
def nothing_left_behind(process: subprocess.Popen[str]) -> Iterator[None]:
    """A killed driver's Ray and workers end by themselves; what does not is ended here, by id, and reported.

    Ray's two agents look for a Ray that is gone for a minute or two before they end; they hold nothing.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    agents = [p for p in family if is_agent(p)]
    yield
    _, alive = psutil.wait_procs([p for p in family if p not in agents], timeout=60)
    names = [p.name() for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    for left in [*alive, *agents]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    assert not names


def test_killed_in_every_way_one_after_the_other(
    pictures: Path, tiny_model: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_here: object
) -> None:
    """Each run goes on from where the last one was killed; the last one, on the session's Ray, finishes the tables.

    All work in a directory with modules that nothing may import.
    """
    job, imported = job_for(tmp_path, "slow://", pictures, tiny_model), write_traps(tmp_path)

    # The driver, as soon as there is a row; before that, a second run on the same output is refused.
    process = start_and_wait(job, 1)
    assert not children(process, is_spared)
    with pytest.raises(RunError, match=rf"another run is working there \(process {process.pid}\)"):
        clipray.run(job)
    with nothing_left_behind(process):
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= rows_on_disk(job) < ROWS
    assert rows_on_disk(job, "regions")

    # The encoder: the run goes on. Then Ctrl-C, which in a terminal reaches Ray's processes too.
    process = start_and_wait(job, MORE)
    (encoder,) = children(process, is_encoder)
    encoder.kill()
    wait_for_rows(job, rows_on_disk(job) + MORE, process)
    stop(job, process, signal.SIGINT)

    process = start_and_wait(job, MORE)
    with nothing_left_behind(process):
        (raylet,) = children(process, is_raylet)
        raylet.kill()
        assert process.wait(timeout=120) != 0
    assert rows_on_disk(job) < ROWS

    # Everything at once, and a file torn, as a power cut may leave it.
    process = start_and_wait(job, MORE)
    for child in [*children(process, lambda _: True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    images = tmp_path / "out" / "images"
    assert not (images / "_table.json").exists()
    shards = sorted(images.glob("*.parquet"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])
    (images / ".tmp-0123").write_bytes(b"half a file")

    # SIGTERM, in the next step.
    process = start_and_wait(job, 1, table="texts")
    stop(job, process, signal.SIGTERM)
    assert 1 <= rows_on_disk(job, "texts") < len(TEXTS)
    clipray.run(job)
    assert not imported.exists(), imported.read_text()
    events = (tmp_path / "out" / "events.jsonl").read_text()
    assert '"torn_files": 1' in events
    assert not list(images.glob(".tmp-*"))
    begun = len(list(tmp_path.glob("job.*.log"))) + 1  # the last one, in this process, has no log
    assert sum('"event": "run_started"' in line for line in events.splitlines()) == begun >= 6

    quiet = tmp_path_factory.mktemp("undisturbed")
    clipray.run(job_for(quiet, "", pictures, tiny_model))
    for table, key, vector in TABLES:
        assert_same(*(read_table(str(home / "out" / table)).sort_by(key) for home in (tmp_path, quiet)), vector)


def assert_same(found: pa.Table, expected: pa.Table, vector: str | None) -> None:
    apart = {"uri", vector}
    same = [name for name in expected.column_names if name not in apart]
    assert found.select(same) == expected.select(same)
    if vector:
        gap = np.stack(found[vector].to_numpy()) - np.stack(expected[vector].to_numpy())
        assert np.abs(gap).max() <= 1e-6


def stop(job: str, process: subprocess.Popen[str], which: signal.Signals) -> None:
    """End a run by a signal, as a terminal sends Ctrl-C to its process group; it says how to go on."""
    with nothing_left_behind(process):
        (os.killpg if which == signal.SIGINT else os.kill)(process.pid, which)
        assert process.wait(timeout=60) == 130
    text = max(Path(job).parent.glob("job.*.log"), key=os.path.getmtime).read_text()
    assert "goes on from there" in text
    assert "Traceback" not in text


@pytest.mark.usefixtures("ray_here")
def test_rows_that_kill_their_worker_are_found_and_rejected(pictures: Path, tiny_model: str, tmp_path: Path) -> None:
    make_manifest(str(pictures), str(tmp_path / "m.parquet"))
    table = pq.read_table(tmp_path / "m.parquet")[:40]
    rows = [{**row, "uri": f"slow://{row['uri']}"} for row in table.to_pylist()]
    rows[17]["uri"], rows[18]["uri"] = "slow:///nowhere/poison-a.jpg", "slow:///nowhere/poison-b.jpg"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    job = write_job(
        tmp_path / "job.yaml",
        tmp_path / "m.parquet",
        tiny_model,
        rows_per_block=8,
        batch_size=8,
        schemes=["slow"],
        max_reject_rate=0.05,
    )
    clipray.run(job)
    assert reasons(tmp_path / "out" / "rejects" / "images") == {
        rows[17]["image_id"]: "worker_died",
        rows[18]["image_id"]: "worker_died",
    }
    assert len(vectors(tmp_path / "out" / "images")) == 38
