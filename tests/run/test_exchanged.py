"""Content that is exchanged under the same ids, by a job: just these rows are made again, and nothing is read in vain."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support import draw_pictures, write_job

import clipray
import clipray.inputs.row_index
from clipray import tables
from clipray.errors import Stopped
from clipray.inputs.content_versions import CONTENT_HASH
from clipray.inputs.make_manifest import make_manifest
from clipray.steps.base.encode_run import EncodeRun
from clipray.storage.folder import Folder

pytestmark = pytest.mark.usefixtures("ray_here")

BOX = [0.0, 0.0, 40.0, 40.0]


def cloud(seed: int) -> bytes:
    file = io.BytesIO()
    np.save(file, np.random.default_rng(seed).normal(size=(50, 3)))
    return file.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("files")
    draw_pictures(folder, 16)
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


def write(path: Path, contents: dict[str, bytes | None], key: str = "image_id", **columns: list[Any]) -> None:
    rows = {key: list(contents), "bytes": pa.array(list(contents.values()), pa.binary()), **columns}
    pq.write_table(pa.table(rows), path)


def shards(url: Path) -> dict[str, str]:
    """Id -> the shard that it is in."""
    folder = Folder(str(url))
    ids = {name: tables.read_shard(folder, name).column(0).to_pylist() for name in tables.shard_names(folder)}
    return {row: name for name, rows in ids.items() for row in rows}


def hashes(folder: Path) -> dict[str, str | None]:
    data = tables.read_table(str(folder))
    return dict(zip(data.column(0).to_pylist(), data[CONTENT_HASH].to_pylist(), strict=True))


def oracle(contents: dict[str, bytes | None]) -> dict[str, str | None]:
    return {i: data and hashlib.sha256(data).hexdigest()[:32] for i, data in contents.items()}


@pytest.mark.parametrize("step", ["embed_images", "embed_regions", "attack", "render_depth"])
def test_rows_with_other_bytes_are_made_again(step: str, files: list[bytes], tmp_path: Path) -> None:
    contents = [cloud(n) for n in range(8)] if step == "render_depth" else files[:8]
    table, key, columns, settings = {
        "embed_images": ("images", "image_id", {}, {}),
        "embed_regions": ("regions_pictures", "image_id", {"boxes": [[BOX]] * 6}, {"prompt": "none"}),
        "attack": ("attacks", "image_id", {"label": ["red circle"] * 6}, {"classes": ["red circle", "blue square"]}),
        "render_depth": ("clouds", "cloud_id", {}, {"prompt": "none"}),
    }[step]
    before = dict(zip("abcdef", contents, strict=False))
    write(tmp_path / "m.parquet", before, key, **columns)
    given = {"manifest": str(tmp_path / "m.parquet"), "batch_size": 4, "max_reject_rate": 0.9, **settings}
    values = {
        "output": str(tmp_path / "out"),
        "model": {"name": "demo", "precision": "fp32"},
        "steps": [{step: given}],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    clipray.run(str(tmp_path / "job.yaml"))
    folder = tmp_path / "out" / table
    first = shards(folder)
    assert hashes(folder) == oracle(before)
    after = before | {"b": contents[6], "e": contents[7]}
    write(tmp_path / "m.parquet", after, key, **columns)
    assert clipray.plan(str(tmp_path / "job.yaml"))[0][0].note == "2 rows to do"
    clipray.run(str(tmp_path / "job.yaml"))
    assert hashes(folder) == oracle(after)
    assert {i for i, shard in shards(folder).items() if shard != first[i]} == {"b", "e"}
    (report, *_) = clipray.run(str(tmp_path / "job.yaml"))
    assert report.note == "was finished already"


def job(home: Path, model: str, **settings: Any) -> str:
    return write_job(home / "job.yaml", home / "m.parquet", model, batch_size=4, max_reject_rate=0.9, **settings)


def test_a_manifest_that_has_not_changed_is_not_read_for_its_bytes(
    files: list[bytes], tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = clipray.inputs.row_index.read_rows

    def read_rows(row_group: Any, columns: Any, *rest: Any) -> Any:
        read.extend(columns)
        return plain(row_group, columns, *rest)

    monkeypatch.setattr(clipray.inputs.row_index, "read_rows", read_rows)
    contents = dict(zip("abcd", files, strict=False))
    write(tmp_path / "m.parquet", contents)
    run = job(tmp_path, tiny_model)
    clipray.run(run)
    assert clipray.run(run)[0].note == "was finished already"
    assert "image_id" in read
    assert "bytes" not in read
    images = tmp_path / "out" / "images"
    before = {path: path.stat().st_mtime_ns for path in images.glob("*.parquet")}
    write(tmp_path / "m.parquet", contents)  # the same again, with another time
    assert clipray.run(run)[0].note == ""
    assert "bytes" in read
    assert {path: path.stat().st_mtime_ns for path in images.glob("*.parquet")} == before
    read.clear()
    assert clipray.run(run)[0].note == "was finished already"
    assert "bytes" not in read


def test_a_kill_between_an_exchange_and_the_end_hides_nothing(
    files: list[bytes], tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = dict(zip("abcdef", files, strict=False)) | {"bad": b"no picture", "worse": files[6][:400], "none": None}
    write(tmp_path / "m.parquet", contents)
    run, images = job(tmp_path, tiny_model), tmp_path / "out" / "images"
    clipray.run(run)
    good, rejected = oracle({i: contents[i] for i in "abcdef"}), {i: contents[i] for i in ("bad", "worse", "none")}
    assert (hashes(images), hashes(tmp_path / "out/rejects/images")) == (good, oracle(rejected))
    contents["a"] = files[10]
    write(tmp_path / "m.parquet", contents)
    with monkeypatch.context() as patch:  # killed before it took stock
        patch.setattr(EncodeRun, "_check_committed", _killed)
        with pytest.raises(Stopped):
            clipray.run(run)
    contents["b"] = files[11]
    write(tmp_path / "m.parquet", contents)
    with monkeypatch.context() as patch:  # and after that
        patch.setattr(EncodeRun, "_pass", _killed)
        with pytest.raises(Stopped):
            clipray.run(run)
    assert json.loads((images / "_started.json").read_text())["content_hash"] is True
    assert set(shards(images)) == set("cdef")
    contents |= {"c": files[12], "bad": files[13]}
    write(tmp_path / "m.parquet", contents)
    clipray.run(run)
    assert hashes(images) == oracle({i: data for i, data in contents.items() if i not in ("worse", "none")})
    assert hashes(tmp_path / "out/rejects/images").keys() == {"worse", "none"}
    assert clipray.run(run)[0].note == "was finished already"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_table_that_was_begun_without_hashes_goes_on_without(
    files: list[bytes], tiny_model: str, tmp_path: Path
) -> None:
    """As tables of earlier versions: it stays finished, and is extended; one table never has two schemas."""
    contents = dict(zip("abcd", files, strict=False))
    for name, data in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    pq.write_table(pa.table({"image_id": list("abcd"), "uri": [f"{n}.jpg" for n in "abcd"]}), tmp_path / "m.parquet")
    run, images = job(tmp_path, tiny_model), tmp_path / "out" / "images"
    clipray.run(run)
    assert CONTENT_HASH not in tables.read_table(str(images)).column_names
    uris = [f"{tmp_path}/{n}.jpg" for n in "abcd"]
    write(tmp_path / "m.parquet", contents | {"e": files[4], "bad": b""}, uri=[*uris, None, None])
    (report,) = clipray.run(run)
    assert (report.rows, report.rejected) == (5, 1)
    assert CONTENT_HASH not in tables.read_table(str(images)).column_names
    told: list[str] = []
    (report,) = clipray.run(job(tmp_path, tiny_model, check_sources="size_mtime"), notice=told.append)
    assert report.note == "was finished already"
    assert told == [
        "images: `check_sources` looks at no file, as the table was begun without it; `--fresh` makes it anew"
    ]


def test_files_that_were_replaced_behind_their_uris(tiny_model: str, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "p", 8)
    make_manifest(tmp_path / "p", tmp_path / "m.parquet")
    run, images = job(tmp_path, tiny_model, check_sources="size_mtime"), tmp_path / "out" / "images"
    clipray.run(run)
    first, before = shards(images), hashes(images)
    info = (tmp_path / "p/class0/00000.jpg").stat()
    assert before["class0/00000.jpg"] == f"{info.st_size} {info.st_mtime_ns}"
    assert clipray.run(run)[0].note == "was finished already"
    (tmp_path / "p/class1/00001.jpg").write_bytes((tmp_path / "p/class2/00002.jpg").read_bytes())
    (tmp_path / "p/class0/00003.jpg").write_bytes(b"no picture any more")
    (tmp_path / "p/class2/00005.jpg").unlink()
    assert clipray.plan(run)[0][0].note == "2 rows to do"
    (report,) = clipray.run(run)
    assert (report.rows, report.rejected) == (7, 1)
    assert {i for i, shard in shards(images).items() if shard != first[i]} == {"class1/00001.jpg"}
    assert clipray.run(run)[0].note == "was finished already"
    unchecked = job(tmp_path, tiny_model)
    assert clipray.run(unchecked)[0].note == "was finished already"
