"""Manifest, pictures and tables on S3 (a server on loopback that fails now and then): the same job, the same tables."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from run.test_embed import vectors
from support import ObjectStore, draw_pictures, write_job
from typer.testing import CliRunner

import clipray
from clipray.cli import app
from clipray.errors import JobError, StorageError
from clipray.inputs.make_manifest import make_manifest
from clipray.runner.status import status
from clipray.storage.folder import Folder
from clipray.tables import read_table


@pytest.fixture
def failing(object_store: ObjectStore) -> Iterator[ObjectStore]:
    """Some requests are throttled, some answers break off."""
    object_store.throttled, object_store.cut = 17, 23
    yield object_store
    object_store.throttled = object_store.cut = 0


@pytest.mark.usefixtures("ray_here")
def test_everything_on_s3(failing: ObjectStore, s3: str, tiny_model: str, tmp_path: Path) -> None:
    home = f"{s3}/whole"
    draw_pictures(tmp_path / "p", 30)
    fs = fsspec.filesystem("s3")
    fs.put(str(tmp_path / "p"), f"{home}/p", recursive=True)
    make_manifest(f"{home}/p", f"{home}/m.parquet", label="folder")
    make_manifest(str(tmp_path / "p"), str(tmp_path / "m.parquet"), label="folder")
    fs.rm(f"{home}/p/class0/00000.jpg")
    fs.pipe_file(f"{home}/p/class1/00001.jpg", b"")
    settings = {"keep": ["label"], "batch_size": 8, "max_reject_rate": 0.1}
    job = write_job(tmp_path / "job.yaml", f"{home}/m.parquet", tiny_model, output=f"{home}/run", **settings)
    done = CliRunner().invoke(app, ["run", job])
    assert done.exit_code == 0, done.output
    assert failing.failures > 5
    failing.throttled = failing.cut = 0
    rejects = read_table(f"{home}/run/rejects/images")
    assert dict(zip(rejects["image_id"].to_pylist(), rejects["reason"].to_pylist(), strict=True)) == {
        "class0/00000.jpg": "not_found",
        "class1/00001.jpg": "empty",
    }
    _same_as_on_a_disk(f"{home}/run/images", tmp_path, tiny_model, settings)
    written = {path: fs.cat_file(path) for path in fs.find(f"{home}/run")}
    assert len(written) >= 5
    assert failing.SECRET not in done.stdout + done.stderr
    assert not [path for path, data in written.items() if failing.SECRET.encode() in data]
    assert clipray.run(job)[0].note == "was finished already"
    draw_pictures(tmp_path / "p", 4, start=30)
    fs.put(str(tmp_path / "p"), f"{home}/q", recursive=True)
    make_manifest(f"{home}/q", f"{home}/m.parquet", label="folder")
    clipray.run(job, retry_rejects=True)  # other URIs: every row is made again, none is doubled
    (report,) = status(f"{home}/run")
    assert (report.state, report.rows, report.rejected) == ("finished", 34, 0)
    assert len(set(read_table(f"{home}/run/images")["uri"].to_pylist())) == 34


def _same_as_on_a_disk(url: str, tmp_path: Path, model: str, settings: dict[str, object]) -> None:
    """The table at `url` is that of the same pictures on this disk, but for the two that S3 has not."""
    clipray.run(write_job(tmp_path / "local.yaml", tmp_path / "m.parquet", model, **settings))
    remote, local = read_table(url), read_table(str(tmp_path / "out" / "images"))
    there = pa.compute.is_in(local["image_id"], remote["image_id"])
    order = [("image_id", "ascending")]
    plain = [name for name in remote.column_names if name not in ("uri", "clip")]
    assert len(remote) == 28
    assert remote.select(plain).sort_by(order).equals(local.filter(there).select(plain).sort_by(order))
    expected, found = vectors(tmp_path / "out" / "images"), vectors(url)
    assert max(float(np.abs(found[k] - expected[k]).max()) for k in found) <= 1e-6


def test_what_was_just_written_is_listed(failing: ObjectStore, s3: str) -> None:
    folder = Folder(f"{s3}/listed")
    assert folder.sizes() == {}  # and whoever keeps listings has kept this one
    for number in range(1, 6):
        folder.write(f"{number}.parquet", b"x" * number)
        assert folder.sizes() == {f"{n}.parquet": n for n in range(1, number + 1)}
        assert Folder(f"{s3}/listed").read(f"{number}.parquet") == b"x" * number
    folder.remove("3.parquet")
    assert "3.parquet" not in folder.sizes()


def one_line(job: str) -> str:
    """What a run says before it starts anything, and within seconds."""
    began = time.monotonic()
    with pytest.raises((StorageError, JobError)) as caught:
        clipray.run(job)
    assert time.monotonic() - began < 60
    assert "\n" not in str(caught.value)
    assert ObjectStore.SECRET not in str(caught.value)
    return str(caught.value)


def test_no_such_bucket(s3: str, tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", "m.parquet", "demo", output="s3://no-such-bucket/run")
    assert one_line(job) == "s3://no-such-bucket/run: no such bucket: make it first"


def test_denied(object_store: ObjectStore, s3: str, tmp_path: Path) -> None:
    object_store.denied = True
    try:
        said = one_line(write_job(tmp_path / "job.yaml", "m.parquet", "demo", output=f"{s3}/denied"))
    finally:
        object_store.denied = False
    assert said.startswith("s3://bucket/denied: access denied: ")


def test_no_credentials(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        said = one_line(write_job(tmp_path / "job.yaml", "m.parquet", "demo", output=f"{s3}/nobody"))
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert said.startswith("s3://bucket/nobody: no credentials: set AWS_PROFILE, or ")


def test_credentials_do_not_belong_in_a_url(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", "m.parquet", "demo", output=f"s3://key:{ObjectStore.SECRET}@bucket/run")
    assert one_line(job).startswith("s3://…@bucket/run: credentials do not belong in a URL")


@pytest.mark.usefixtures("ray_here")
def test_no_good_row_is_lost_to_a_bad_minute(
    object_store: ObjectStore, s3: str, tiny_model: str, tmp_path: Path
) -> None:
    draw_pictures(tmp_path / "p", 30)
    fsspec.filesystem("s3").put(str(tmp_path / "p"), f"{s3}/minute/p", recursive=True)
    make_manifest(f"{s3}/minute/p", str(tmp_path / "m.parquet"))
    object_store.throttled, object_store.cut, object_store.dripped = 3, 10, 20
    try:
        clipray.run(write_job(tmp_path / "job.yaml", tmp_path / "m.parquet", tiny_model, fetch_timeout_s=3))
    finally:
        object_store.throttled = object_store.cut = object_store.dripped = 0
    (report,) = status(str(tmp_path / "out"))
    assert (report.rows, report.rejected) == (30, 0)
