"""A real head on loopback with its job server and token: submit, kill, resubmit, stop; metrics; the page on clusters."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run.test_embed import vectors
from run.test_kill import ENVIRONMENT, rows_on_disk
from support import CLIPRAY, ROOT, ForkedWorkers, ObjectStore, draw_pictures, follow, write_job

from clipray.cli import main
from clipray.engine import job_client
from clipray.engine.connect import ray
from clipray.runner.status import status

ROWS = 400
TOKEN = "the-token-of-this-test"
PYTHON = sys.executable
RAY_START = """
import sys
from ray.scripts.scripts import cli
sys.executable = sys.argv[1]  # by which Ray starts its workers
cli(["start", *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Head:
    address: str
    gcs: str
    metrics: str
    log: Path

    @property
    def hold(self) -> Path:
        """While this file is there, pictures come very slowly; see `testfs`."""
        return self.log.with_name("hold")


def free_ports(count: int) -> list[int]:
    """Ports above those that Ray gives its workers (10002 to 19999)."""
    found: list[int] = []
    for port in range(21_000 + os.getpid() % 20_000, 60_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def head(
    tmp_path_factory: pytest.TempPathFactory, object_store: ObjectStore, forked_workers: ForkedWorkers
) -> Iterator[Head]:
    """`ray start --head` with everything of its own: ports, folder, token; its workers are forked. Ended by its id."""
    gcs, board, client, agent, metrics = free_ports(5)
    folder, log = Path("/tmp") / f"clipray-head-{os.getpid()}", tmp_path_factory.mktemp("head") / "log"
    options = {
        "port": gcs, "node-ip-address": "127.0.0.1", "dashboard-host": "127.0.0.1", "dashboard-port": board,
        "ray-client-server-port": client, "dashboard-agent-listen-port": agent, "metrics-export-port": metrics,
        "temp-dir": folder, "num-cpus": 3, "object-store-memory": 200_000_000,
        "system-config": json.dumps({"metrics_report_interval_ms": 3000}),  # each report looks at all processes
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**ENVIRONMENT, **object_store.environment, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "TESTFS_HOLD": str(log.with_name("hold"))}  # fmt: skip
    with open(log, "w") as out, forked_workers():
        process = subprocess.Popen(
            [PYTHON, "-c", RAY_START, sys.executable, "--head", "--block", "--disable-usage-stats", *words],
            stdout=out,
            stderr=out,
            env=environment,
        )
    try:
        _wait_for(f"http://127.0.0.1:{board}/api/version", process, log)
        yield Head(f"http://127.0.0.1:{board}", f"127.0.0.1:{gcs}", f"http://127.0.0.1:{metrics}/metrics", log)
    finally:
        for found in psutil.process_iter(["cmdline"]):  # all that was started for it names its folder
            if found.pid == process.pid or str(folder) in " ".join(found.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.kill()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(asked, timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no job server: {log.read_text()}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, and the head's token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    return tmp_path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    path = tmp_path_factory.mktemp("slow") / "m.parquet"
    files = sorted(pictures.rglob("*.jpg"))
    uris = [f"slow://{files[n % len(files)]}" for n in range(ROWS)]
    pq.write_table(pa.table({"image_id": [f"{n:05d}" for n in range(ROWS)], "uri": uris}), path)
    return path


def job_for(folder: Path, manifest: Path) -> str:
    settings = {"rows_per_block": 16, "flush_s": 0.2, "batch_size": 16, "schemes": ["slow"], "decode_in": "tasks"}
    return Path(write_job(folder / "job.yaml", manifest, "demo", **settings)).name


def clipray(words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Exit code and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["clipray", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return int(caught.value.code or 0), out + err


def driver(folder: Path) -> int:
    """Process of the run that was started last."""
    events = [json.loads(line) for line in (folder / "out" / "events.jsonl").read_text().splitlines()]
    return [event["pid"] for event in events if event["event"] == "run_started"][-1]


@contextlib.contextmanager
def held_at_first_rows(head: Head, job: Path) -> Iterator[None]:
    """Once the job that was just submitted has written rows, in the midst of it; it cannot finish before the end of this."""
    head.hold.touch()  # at once: rows are decoded while the encoder starts
    try:
        for _ in range(1200):
            if rows_on_disk(str(job)):
                break
            time.sleep(0.1)
        assert rows_on_disk(str(job))
        yield
    finally:
        head.hold.unlink(missing_ok=True)


def test_killed_and_submitted_again(
    head: Head, here: Path, manifest: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run, to = job_for(here, manifest), str(here / "out"), ["--address", head.address]
    code, said = clipray(["submit", job, "--detach", *to], capfd, monkeypatch)
    assert (code, "-1 is submitted" in said) == (0, True), said
    with held_at_first_rows(head, here / job):
        os.kill(driver(here), signal.SIGKILL)
        for _ in range(60):
            code, said = clipray(["status", run, *to], capfd, monkeypatch)
            if "failed" in said:
                break
            time.sleep(0.5)
        assert "-1: failed" in said
        assert status(run)[0].state == "partial"
    code, said = clipray(["submit", job, *to], capfd, monkeypatch)
    assert code == 0, said
    assert "-2 goes on from an earlier one" in said
    assert re.search(r"images: \d+ of 400 rows on disk", said)  # progress, line by line
    assert "-2 succeeded" in said
    assert len(vectors(here / "out" / "images")) == ROWS


def test_stopped_and_what_it_tells_prometheus(
    head: Head, here: Path, manifest: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run, to = job_for(here, manifest), str(here / "out"), ["--address", head.address]
    clipray(["submit", job, "--detach", *to], capfd, monkeypatch)
    with held_at_first_rows(head, here / job):
        figures: dict[str, float] = {}
        for _ in range(60):
            with urllib.request.urlopen(head.metrics, timeout=10) as answer:
                text = answer.read().decode()
            lines = [line for line in text.splitlines() if line.startswith("ray_clipray_") and 'step="images"' in line]
            figures = {
                line.split("{")[0] + "".join(re.findall(r'stage="(\w+)"', line)): float(line.split()[-1])
                for line in lines
            }
            if figures.get("ray_clipray_rows_written", 0) >= 1:
                break
            time.sleep(0.5)
        assert figures["ray_clipray_rows"] == ROWS
        assert 1 <= figures["ray_clipray_rows_written"] <= figures["ray_clipray_rows_done"] <= ROWS
        assert figures["ray_clipray_rows_rejected"] == 0
        assert figures["ray_clipray_rows_per_second"] >= 0
        assert {
            "ray_clipray_queue_rowsdecode",
            "ray_clipray_queue_rowsencode",
            "ray_clipray_queue_rowswrite",
        } <= figures.keys()
        code, said = clipray(["submit", job, "--detach", *to], capfd, monkeypatch)
        assert (code, "-1 is running already (running)" in said) == (0, True), said
        code, said = clipray(["stop", run, *to], capfd, monkeypatch)
        assert (code, "-1: stopped" in said) == (0, True), said
        assert '"event": "stopped"' in (here / "out" / "events.jsonl").read_text()  # it was given time to write
        assert 0 < rows_on_disk(str(here / job)) < ROWS
    code, said = clipray(["stop", run, *to], capfd, monkeypatch)
    assert (code, "-1: stopped" in said) == (0, True)


def test_the_page_on_clusters(head: Head, s3: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("s3")
    fs.mkdir("photos")
    draw_pictures(here / "pictures", 24)
    fs.put(str(here / "pictures"), "photos/pictures", recursive=True)
    (here / "jobs").mkdir()
    shutil.copy(ROOT / "jobs" / "run.py", here / "jobs" / "run.py")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    printed = follow(page.replace("http://127.0.0.1:8265", head.address), here)
    assert "images: 1 encoder with 3 threads" in printed
    assert "24 images in s3://photos/manifest.parquet" in printed
    assert "-1: succeeded" in printed
    assert {report.name: report.rows for report in status("s3://photos/run") if report.name != "metrics"} == {
        "images": 24, "clusters": 24, "clusters_centroids": 3,
    }  # fmt: skip
    (plain,) = re.findall(r"^ray job submit.*$", page, re.MULTILINE)
    words = [str(Path(sys.executable).parent / "ray"), *shlex.split(plain)[1:]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, cwd=here, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was finished already" in done.stdout


def test_a_token_is_asked_for(
    head: Head, here: Path, manifest: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(here, manifest)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    code, said = clipray(["submit", job, "--address", head.address], capfd, monkeypatch)
    assert (code, len(said.splitlines())) == (2, 1)
    assert (
        f"{head.address}: the cluster asks for a token, and ours is not its own (403): put the cluster's token" in said
    )
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(here / "none"))
    code, said = clipray(["status", str(here / "out"), "--address", head.address], capfd, monkeypatch)
    assert (code, len(said.splitlines())) == (2, 1)
    assert "the cluster asks for a token, and there is none here (401)" in said
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_gcs_server_port_wait_time_s": "1"}  # not 20
    done = subprocess.run(
        [CLIPRAY, "plan", job, "--address", head.gcs], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"the cluster at '{head.gcs}' refuses us: set RAY_AUTH_MODE=token" in done.stderr


class OldRay(BaseHTTPRequestHandler):
    """Answers as the job server of Ray 2.9 does, or as a web server that is none."""

    def do_GET(self) -> None:
        answer = b'{"version": "4", "ray_version": "2.9.3"}' if self.path == "/api/version" else b"<html>"
        self.send_response(200 if self.path == "/api/version" else 404)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def old() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), OldRay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_heads_that_cannot_be_used(
    old: str,
    silent: str,
    here: Path,
    manifest: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_for(here, manifest)
    monkeypatch.setattr(job_client, "ANSWER_S", 1.0)
    for address, words in {
        "http://127.0.0.1:1": "http://127.0.0.1:1: no answer from a Ray job server: [Errno 111] Connection refused",
        silent: f"http://{silent}: no answer from a Ray job server: timed out",
        old: f"{old}: the cluster runs Ray 2.9.3; this clipray needs 2.60 or later, below 2.64",
        f"{old}/proxy": f"{old}/proxy: what answers there is no Ray job server (HTTP 404)",
        "auto": "auto: expected the job server of a Ray head, such as http://10.0.0.1:8265",
    }.items():
        code, said = clipray(["submit", job, "--address", address], capfd, monkeypatch)
        assert (code, said) == (2, f"clipray: {words}\n")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the session's Ray would serve any run
    code, said = clipray(["run", job, "--address", "127.0.0.1:1"], capfd, monkeypatch)
    assert (code, said) == (2, "clipray: no Ray cluster answers at 127.0.0.1:1: Connection refused\n")


def test_jobs_that_mean_this_machine(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said_of(job: str) -> str:
        code, said = clipray(["submit", job, "--address", "http://127.0.0.1:1"], capfd, monkeypatch)
        assert (code, len(said.splitlines())) == (2, 1)
        return said

    step = "model: {name: demo}\nsteps: [{embed_images: {manifest: %s}}]\n"
    (here / "out.yaml").write_text("output: runs/out\n" + step % "s3://photos/m.parquet")
    (here / "in.yaml").write_text("output: s3://photos/out\n" + step % "m.parquet")
    (here / "sub").mkdir()
    (here / "elsewhere.yaml").write_text("output: s3://photos/out\n" + step % "s3://photos/m.parquet")
    assert "out.yaml: output: runs/out is a path in this folder" in said_of("out.yaml")
    assert "in.yaml: images: manifest: m.parquet is a path in this folder" in said_of("in.yaml")
    monkeypatch.chdir(here / "sub")
    assert "../elsewhere.yaml is not in the working directory" in said_of("../elsewhere.yaml")


def test_what_travels(here: Path) -> None:
    from clipray.job import Job
    from clipray.runner.submit import mark, runtime_env

    (here / "needs.txt").write_text("einops==0.8.1\n")
    job = Job(output=str(here / "tables" / "photos"), steps=[{"embed_images": {"manifest": "m.parquet"}}])
    found = runtime_env(job, "needs.txt", ["*.mp4"])
    assert found["working_dir"] == str(here)
    assert found["pip"] == "needs.txt"
    assert {".git", ".venv", "/runs", "/data", "*.mp4", "/tables/photos"} <= set(found["excludes"])
    assert {"*.py", "*.pyc", "*.so"} <= set(found["excludes"])
    assert not [name for name in found["env_vars"] if "AWS" in name or "TOKEN" in name]
    (here / "clipray").mkdir()
    (here / "clipray" / "__init__.py").write_text("")
    assert {"/*.py"} == {name for name in runtime_env(job, None, ())["excludes"] if name.endswith("*.py")}
    assert mark("s3://photos/run") == mark("s3://photos/run/") != mark("s3://photos/run2")
