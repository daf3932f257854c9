"""Manifest, pictures and tables on S3 (a server on loopback): the same job, in its own process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support import CLIPRAY, draw_pictures, write_job

from clipray.status import status
from clipray.tables import read_table


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    fsspec.config.conf.pop("s3", None)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("whole-job")  # the servers of a process share their buckets
    yield "s3://whole-job"
    server.stop()


def clipray(*words: str) -> str:
    done = subprocess.run(
        [CLIPRAY, *words], capture_output=True, text=True, timeout=240, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_everything_on_s3(bucket: str, tiny_model: str, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "p", 30)
    fs = fsspec.filesystem("s3")
    fs.put(str(tmp_path / "p"), f"{bucket}/p", recursive=True)
    clipray("manifest", f"{bucket}/p", f"{bucket}/m.parquet", "--label", "folder")
    fs.rm(f"{bucket}/p/class0/00000.jpg")
    fs.pipe_file(f"{bucket}/p/class1/00001.jpg", b"")
    job = write_job(
        tmp_path / "job.yaml",
        f"{bucket}/m.parquet",
        tiny_model,
        output=f"{bucket}/run",
        keep=["label"],
        batch_size=8,
        max_reject_rate=0.1,
    )
    clipray("run", job)
    table = read_table(f"{bucket}/run/images")
    assert len(table) == 28
    assert set(table["label"].to_pylist()) == {"class0", "class1", "class2"}
    rejects = read_table(f"{bucket}/run/rejects/images")
    assert dict(zip(rejects["image_id"].to_pylist(), rejects["reason"].to_pylist(), strict=True)) == {
        "class0/00000.jpg": "unreachable",
        "class1/00001.jpg": "empty",
    }
    assert "was finished already" in clipray("run", job)
    draw_pictures(tmp_path / "p", 4, start=30)
    fs.put(str(tmp_path / "p"), f"{bucket}/q", recursive=True)
    clipray("manifest", f"{bucket}/q", f"{bucket}/m.parquet", "--label", "folder")
    clipray("run", "--retry-rejects", job)  # other URIs: every row is made again, none is doubled
    (report,) = status(f"{bucket}/run")
    assert (report.state, report.rows, report.rejected) == ("finished", 34, 0)
    assert len(set(read_table(f"{bucket}/run/images")["uri"].to_pylist())) == 34
