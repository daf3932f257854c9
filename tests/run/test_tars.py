"""Tars as they lie: the vectors of their images, only what is new or changed encoded again, on S3 too, and after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from run.test_embed import vectors
from support import PYTHONPATH, ROOT, ObjectStore, write_job

import clipray
from clipray.report.thumbnails import ImageSource, Thumbnails
from clipray.storage.events import read_events
from clipray.storage.folder import Folder
from clipray.tables import read_table

DRIVER = "import sys, ray, clipray; ray.init(sys.argv[1], log_to_driver=False); clipray.run(sys.argv[2])"
pytestmark = pytest.mark.usefixtures("ray_here")


def write_tars(folder: Path, pictures: Path, count: int) -> dict[str, Path]:
    """Tars of pictures with captions; returns image_id -> picture."""
    folder.mkdir(parents=True, exist_ok=True)
    files, ids = sorted(pictures.rglob("*.jpg")), {}
    for number in range(count):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
            for row, file in enumerate(files[number::count]):
                tar.add(file, f"{row:05d}.jpg")
                info = tarfile.TarInfo(f"{row:05d}.txt")
                info.size = len(file.name)
                tar.addfile(info, io.BytesIO(file.name.encode()))
                ids[f"{number:03d}/{row:05d}"] = file
    return ids


def job_of(home: Path, tars: str, model: str, **settings: Any) -> str:
    job = write_job(home / "job.yaml", "TARS", model, **{"batch_size": 16, **settings})
    text = Path(job).read_text().replace("manifest: TARS", f"manifest: {{tars: '{tars}', columns: [txt]}}")
    Path(job).write_text(text)
    return job


@pytest.fixture(scope="module")
def expected(pictures: Path, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """By file name, the vectors of the pictures as single files."""
    from clipray.inputs.make_manifest import make_manifest

    home = tmp_path_factory.mktemp("single")
    make_manifest(str(pictures), str(home / "m.parquet"))
    clipray.run(write_job(home / "job.yaml", home / "m.parquet", tiny_model, batch_size=16))
    return {image_id.rpartition("/")[2]: vector for image_id, vector in vectors(home / "out/images").items()}


def assert_right(out: str, ids: dict[str, Path], expected: dict[str, np.ndarray]) -> None:
    table = read_table(f"{out}/images")
    assert sorted(table["image_id"].to_pylist()) == sorted(ids)  # each once
    for row in table.select(["image_id", "clip", "uri", *({"txt"} & set(table.schema.names))]).to_pylist():
        name = ids[row["image_id"]].name
        assert np.abs(np.array(row["clip"]) - expected[name]).max() <= 1e-6
        assert row.get("txt", name) == name
        assert "#bytes=" in row["uri"]


def encoded(out: Path) -> int:
    """Rows that the last run encoded."""
    events = read_events(Folder(str(out)))
    last = max(n for n, event in enumerate(events) if event["event"] == "run_started")
    passes = (event["rows_by_node"] for event in events[last:] if event["event"] == "pass_ended")
    return sum(sum(rows["encode"].values()) for rows in passes)


def test_only_rows_of_new_and_changed_tars_are_encoded_again(
    pictures: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path
) -> None:
    ids = write_tars(tmp_path / "tars", pictures, 5)
    hidden = (tmp_path / "tars/004.tar").rename(tmp_path / "later.tar")
    job = job_of(tmp_path, f"{tmp_path}/tars", tiny_model, keep=["txt"])
    (report,) = clipray.run(job)
    assert report.rows == encoded(tmp_path / "out") == 240
    assert_right(f"{tmp_path}/out", {key: path for key, path in ids.items() if key < "004"}, expected)
    assert clipray.run(job)[0].note == "was finished already"

    hidden.rename(tmp_path / "tars/004.tar")
    (planned,), _ = clipray.plan(job)
    assert (planned.state, planned.note) == ("partial", "60 rows to do")
    clipray.run(job)
    assert encoded(tmp_path / "out") == 60
    assert_right(f"{tmp_path}/out", ids, expected)

    # Other pictures under the same keys; and a tar that was only written again.
    os.utime(tmp_path / "tars/003.tar", ns=(1, 1))
    os.rename(tmp_path / "tars/002.tar", tmp_path / "tars/x.tar")
    os.rename(tmp_path / "tars/001.tar", tmp_path / "tars/002.tar")
    os.rename(tmp_path / "tars/x.tar", tmp_path / "tars/001.tar")
    swap = {"001": "002", "002": "001"}
    swapped = {key: ids[f"{swap.get(key[:3], key[:3])}{key[3:]}"] for key in ids}
    clipray.run(job)
    assert encoded(tmp_path / "out") == 180
    assert_right(f"{tmp_path}/out", swapped, expected)
    source = read_table(f"{tmp_path}/out/images")["uri"][0].as_py()
    assert Thumbnails(32, 2_000).of_uri(ImageSource("a", source, (64, 64)))[0]


def test_on_s3_a_tar_costs_a_few_requests(
    object_store: ObjectStore, s3: str, pictures: Path, expected: dict[str, np.ndarray], tiny_model: str, tmp_path: Path
) -> None:
    ids = write_tars(tmp_path / "tars", pictures, 2)
    fsspec.filesystem("s3").put(f"{tmp_path}/tars", f"{s3}/tars", recursive=True)
    job = job_of(tmp_path, f"{s3}/tars/{{000..001}}.tar", tiny_model, output=f"{s3}/tars-run")
    before = len(object_store.requests)
    clipray.run(job)
    asked = Counter(object_store.requests[before:])
    for number in range(2):  # read through for the index, and the images of each block together
        assert 2 <= asked[f"GET /bucket/tars/{number:03d}.tar"] <= 6
    assert_right(f"{s3}/tars-run", ids, expected)
    before = len(object_store.requests)
    assert clipray.run(job)[0].note == "was finished already"
    assert not [key for key in object_store.requests[before:] if key.startswith("GET") and key.endswith(".tar")]


def test_a_killed_run_goes_on_and_every_row_is_there_once(
    pictures: Path,
    expected: dict[str, np.ndarray],
    tiny_model: str,
    tmp_path: Path,
    ray_here: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A driver of its own on the session's Ray, killed half-way; what was left of the index and of the table is used."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/lib"))
    fsspec.register_implementation("slow", "testfs.SlowFileSystem", clobber=True)
    ids = write_tars(tmp_path / "tars", pictures, 4)
    tars = f"slow://{tmp_path}/tars/{{000..003}}.tar"
    job = job_of(tmp_path, tars, tiny_model, rows_per_block=4, flush_s=0, schemes=["slow"])
    images, index = tmp_path / "out/images", tmp_path / "out/_tars"
    address = ray_here.get_runtime_context().gcs_address  # type: ignore[attr-defined]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, job],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": PYTHONPATH},
        )
        try:
            end = time.monotonic() + 120
            while len(list(images.glob("*.parquet"))) < 2:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (images / "_table.json").exists()
    left = {path: path.stat().st_mtime_ns for path in (*images.glob("*.parquet"), *index.glob("*.parquet"))}
    removed = min(index.glob("*.parquet"))
    removed.unlink()  # as if it had been killed before
    (report,) = clipray.run(job_of(tmp_path, tars, tiny_model, schemes=["slow"]))
    assert report.rows == 300
    assert encoded(tmp_path / "out") < 300
    assert_right(f"{tmp_path}/out", ids, expected)
    assert all(path.stat().st_mtime_ns == changed for path, changed in left.items() if path != removed)
