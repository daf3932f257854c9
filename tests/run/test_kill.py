"""Kill the driver, a worker, the raylet, in the middle; run again; every row is there, once, with the same vector."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from run.test_embed import reasons, vectors
from support import CLIPRAY, ROOT, write_job

from clipray.manifest import make_manifest

ROWS = 1_500
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "lib"), os.environ.get("PYTHONPATH", "")]),
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A manifest in which every picture stands 5 times under another id, behind a slow line: time to kill."""
    import pyarrow as pa

    path = tmp_path_factory.mktemp("many") / "m.parquet"
    files = sorted(pictures.rglob("*.jpg"))
    ids = [f"{n:05d}" for n in range(ROWS)]
    pq.write_table(pa.table({"image_id": ids, "uri": [f"slow://{files[n % len(files)]}" for n in range(ROWS)]}), path)
    return path


@pytest.fixture(scope="module")
def expected(many: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The vectors of an uninterrupted run."""
    home = tmp_path_factory.mktemp("uninterrupted")
    finish(job_for(home, many, tiny_model))
    return vectors(home / "out" / "images")


def job_for(home: Path, manifest: Path, model: str, **settings: object) -> str:
    return write_job(
        home / "job.yaml", manifest, model, rows_per_block=64, flush_s=0.2, batch_size=32, schemes=["slow"], **settings
    )


def start(job: str) -> subprocess.Popen[str]:
    log = open(Path(job).with_suffix(f".{time.time():.0f}.log"), "w")  # noqa: SIM115
    return subprocess.Popen(
        [CLIPRAY, "run", job],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(job: str, timeout_s: float = 240) -> str:
    done = subprocess.run(
        [CLIPRAY, "run", job], capture_output=True, text=True, env=ENVIRONMENT, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def rows_on_disk(job: str, table: str = "images") -> int:
    total = 0
    for shard in (Path(job).parent / "out" / table).glob("*.parquet"):
        with contextlib.suppress(OSError):
            total += pq.read_metadata(shard).num_rows
    return total


def wait_for_rows(
    job: str, rows: int, process: subprocess.Popen[str], timeout_s: float = 120, table: str = "images"
) -> None:
    end = time.monotonic() + timeout_s
    while rows_on_disk(job, table) < rows:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, f"only {rows_on_disk(job, table)} rows after {timeout_s} s"
        time.sleep(0.05)


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


def assert_same(job: str, expected: dict[str, np.ndarray]) -> None:
    found = vectors(Path(job).parent / "out" / "images")
    assert found.keys() == expected.keys()
    assert max(float(np.abs(found[k] - expected[k]).max()) for k in expected) <= 1e-6


@pytest.mark.parametrize("at", [1, 700])
def test_driver_killed(at: int, many: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, at, process)
    with nothing_left_behind(process):
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = rows_on_disk(job)
    assert at <= kept < ROWS
    finish(job)
    assert_same(job, expected)
    again = sum(
        '"event": "step_started"' in line for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()
    )
    assert again == 2


def test_everything_killed_at_once_and_a_file_torn(
    many: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path
) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, 300, process)
    for child in [*children(process, lambda _: True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    shards = sorted((tmp_path / "out" / "images").glob("*.parquet"))
    shards[0].write_bytes(shards[0].read_bytes()[:-100])  # as a power cut may leave it
    (tmp_path / "out" / "images" / ".tmp-0123").write_bytes(b"half a file")
    finish(job)
    assert_same(job, expected)
    assert '"torn_files": 1' in (tmp_path / "out" / "events.jsonl").read_text()
    assert not list((tmp_path / "out" / "images").glob(".tmp-*"))


def test_encoder_killed_and_the_run_goes_on(
    many: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path
) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, 300, process)
    (encoder,) = children(process, is_encoder)
    encoder.kill()
    assert process.wait(timeout=240) == 0
    assert_same(job, expected)


def test_raylet_killed(many: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, 300, process)
    with nothing_left_behind(process):
        (raylet,) = children(process, is_raylet)
        raylet.kill()
        assert process.wait(timeout=120) != 0
    assert rows_on_disk(job) < ROWS
    finish(job)
    assert_same(job, expected)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_stopped_by_a_signal(
    which: signal.Signals, many: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path
) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, 300, process)
    with nothing_left_behind(process):
        os.killpg(process.pid, which)  # a terminal's Ctrl-C reaches Ray's processes too
        assert process.wait(timeout=60) == 130
    text = next(tmp_path.glob("job.*.log")).read_text()
    assert "goes on from there" in text
    assert "Traceback" not in text
    finish(job)
    assert_same(job, expected)


def test_second_run_on_the_same_output_is_refused(many: Path, tiny_model: str, tmp_path: Path) -> None:
    job = job_for(tmp_path, many, tiny_model)
    process = start(job)
    wait_for_rows(job, 1, process)
    second = subprocess.run([CLIPRAY, "run", job], capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 1
    assert second.stderr.startswith("clipray: ")
    assert f"another run is at work there (process {process.pid})" in second.stderr
    with nothing_left_behind(process):
        process.kill()
        process.wait()


def test_rows_that_kill_their_worker_are_found_and_rejected(pictures: Path, tiny_model: str, tmp_path: Path) -> None:
    make_manifest(str(pictures), str(tmp_path / "m.parquet"))
    table = pq.read_table(tmp_path / "m.parquet")
    rows = [{**row, "uri": f"slow://{row['uri']}"} for row in table.to_pylist()]
    rows[17]["uri"], rows[203]["uri"] = "slow:///nowhere/poison-a.jpg", "slow:///nowhere/poison-b.jpg"
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    job = write_job(
        tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, rows_per_block=64, batch_size=16, schemes=["slow"]
    )
    finish(job)
    assert reasons(tmp_path / "out" / "rejects" / "images") == {
        rows[17]["image_id"]: "worker_died",
        rows[203]["image_id"]: "worker_died",
    }
    assert len(vectors(tmp_path / "out" / "images")) == 298
