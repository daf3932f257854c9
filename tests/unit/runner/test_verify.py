"""`clipray verify`: whatever bit of a finished run flips, it is told, and noted for the next run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support import ROOT
from typer.testing import CliRunner

from clipray import tables
from clipray.cli.app import app
from clipray.errors import DamagedError, JobError
from clipray.inputs.index_reader import hash_of, open_index
from clipray.runner.status import status
from clipray.runner.verify import check_table, verify
from clipray.storage.folder import Folder
from clipray.tables.metrics import Metric, write_metrics
from clipray.tables.started import STARTED, write_started

STAMP = {"fingerprint": "0123456789abcdef", "model": {"name": "RN50"}}
ROWS, WIDTH = 60, 8


def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def finish(folder: Folder, table: str, data: list[pa.Table], **facts: object) -> tables.Record:
    """Write shards and the record of a table, with a note that it was begun."""
    shards = [tables.write_shard(folder, f"part-{n:06d}.parquet", table, part, STAMP) for n, part in enumerate(data)]
    write_started(folder, {"settings": {"step": table}, "fingerprint": STAMP["fingerprint"]})
    known = {"inputs": {"rows": ROWS, "digest": "00"}, "settings": {"step": table}, "provenance": STAMP, **facts}
    schema = data[0].schema if data else tables.arrow_schema(table)
    return tables.commit(folder, table, schema, shards, fingerprint=STAMP["fingerprint"], **known)


def images() -> pa.Table:
    schema = tables.arrow_schema("images", {"clip": WIDTH})
    columns = {
        "image_id": [f"{n}.jpg" for n in range(ROWS)],
        "uri": [f"/photos/{n}.jpg" for n in range(ROWS)],
        "height": pa.array([480] * ROWS, pa.int32()),
        "width": pa.array([640] * ROWS, pa.int32()),
        "clip": tables.vector_array(matrix(), schema.field("clip").type),
    }
    return pa.table(columns, schema=schema)


def write_index(folder: Folder) -> None:
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(matrix())
    name = "index-00112233.faiss"
    folder.write(name, faiss.serialize_index(index).tobytes())
    schema = pa.schema([*tables.arrow_schema("index"), pa.field("image_id", pa.string(), False)])
    ids = pa.table([pa.array(range(ROWS)), pa.array([f"{n}.jpg" for n in range(ROWS)])], schema=schema)
    files = {"index_file": name, "lists_file": None, "sizes": {name: folder.sizes()[name]}}
    made = {**STAMP, **files, "sha256": {name: hash_of(folder, name)}, "metric": "cosine", "space": {}, "width": WIDTH}
    finish(folder, "index", [ids], provenance=made, summary={"type": "Flat"})


def write_run(output: Folder) -> None:
    """A finished run of an encoded table with rejects, figures, and an index."""
    data = images()
    finish(output.sub("images"), "images", [data[:40], data[40:]], inputs={"rows": ROWS, "manifest": ["m.parquet"]})
    finish(output.sub("rejects/images"), "rejects", [])
    write_index(output.sub("index"))
    write_metrics(output, "index", [Metric("recall", 1.0)], STAMP)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(Folder(str(tmp_path / "run")))
    return tmp_path / "run"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def states(run: Path | str) -> dict[str, str]:
    return {check.name: check.state for check in verify(run)}


def test_a_run_that_is_whole(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert states(run) == dict.fromkeys(("images", "index", "metrics", "rejects/images"), "whole")
    assert not any(check.without_hash for check in verify(run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_any_flipped_bit_is_told(run: Path) -> None:
    """200 bits over all files, drawn by a seed; `benchmarks/bit_flips.py` does it to any run."""
    rng, files = np.random.default_rng(7), sorted(path for path in run.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".parquet", ".json", ".faiss"}
    for _ in range(200):
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        flip(file, int(rng.integers(8 * len(whole))))
        name = file.parent.relative_to(run).as_posix()
        check = check_table(Folder(str(file.parent)), name)
        assert check is not None
        assert [broken.file for broken in check.broken] == [file.name]
        assert tables.noted_as_damaged(Folder(str(file.parent))) == [file.name]
        file.write_bytes(whole)
        (file.parent / tables.DAMAGED).unlink()


def test_what_is_broken_is_told_with_its_rows_and_noted(run: Path) -> None:
    flip(run / "images/part-000001.parquet", 3_000)
    (run / "index/index-00112233.faiss").write_bytes(b"x")
    (run / "rejects/images/_table.json").write_text("{")
    shutil.copy(run / "images/part-000000.parquet", run / "metrics/more.parquet")
    checks = {check.name: check for check in verify(run)}
    told = {name: [(b.file, b.problem, b.rows, b.repair) for b in check.broken] for name, check in checks.items()}
    again = "these rows are encoded again"
    assert told["images"] == [("part-000001.parquet", "content", 20, again)]
    assert told["index"] == [("index-00112233.faiss", "size", ROWS, "the index is built anew")]
    assert [entry[0] for entry in told["rejects/images"]] == ["_table.json"]
    assert [entry[:2] for entry in told["metrics"]] == [("more.parquet", "not in the record")]
    for name in checks:
        folder = Folder(str(run / name))
        record = tables.record_to_go_on(folder)
        assert record is None or not tables.intact(folder, record)  # so that no run says that it is finished
        assert tables.is_broken(folder)


def test_a_missing_shard(run: Path) -> None:
    (run / "images/part-000000.parquet").unlink()
    (check,) = (check for check in verify(run) if check.broken)
    assert [(b.file, b.problem, b.rows) for b in check.broken] == [("part-000000.parquet", "missing", 40)]


def test_an_unfinished_table_is_verified_by_its_shards(run: Path) -> None:
    (run / "images/_table.json").unlink()
    assert states(run)["images"] == "unfinished"
    flip(run / "images/part-000000.parquet", 5_000)
    assert states(run)["images"] == "broken"


def test_an_index_that_has_changed_never_reaches_faiss(run: Path) -> None:
    index, file = Folder(str(run / "index")), run / "index/index-00112233.faiss"
    assert len(open_index("index", index).ids) == ROWS
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(DamagedError, match=r"index-00112233\.faiss has changed since it was built; `clipray verify`"):
        open_index("index", index)


def test_a_foreign_index_without_a_hash_is_one_line(run: Path) -> None:
    folder = Folder(str(run / "index"))
    record = tables.read_record(folder)
    assert record is not None
    file = run / "index/index-00112233.faiss"
    file.write_bytes(b"\x93" * file.stat().st_size)
    del record.provenance["sha256"]
    tables.write_record(folder, record)
    with pytest.raises(DamagedError, match="is no FAISS index: ") as caught:
        open_index("index", folder)
    assert "\n" not in str(caught.value)


def test_a_run_of_before_is_whole_and_told_to_have_no_hashes(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests/data/run-84c8b63/run", tmp_path / "run")
    checks = verify(tmp_path / "run")
    assert {check.state for check in checks} == {"whole"}
    assert {len(check.without_hash) for check in checks if check.name == "index"} == {2}
    assert all(len(check.without_hash) >= check.files for check in checks)
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "run")])
    assert result.exit_code == 0
    assert "made before hashes were recorded" in result.output


def test_no_run_there(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    for url in (tmp_path, tmp_path / "none"):
        with pytest.raises(JobError, match="no run there") as caught:
            verify(url)
        assert caught.value.exit_code == 2


def test_the_command(run: Path) -> None:
    assert CliRunner().invoke(app, ["verify", str(run)]).exit_code == 0
    flip(run / f"images/{STARTED}", 99)
    result = CliRunner().invoke(app, ["verify", str(run), "--json"])
    assert result.exit_code == 1
    answer = json.loads(result.output)
    assert (answer["whole"], answer["run"]) == (False, str(run))
    (table,) = (table for table in answer["tables"] if table["broken"])
    assert (table["name"], table["broken"][0]["file"]) == ("images", STARTED)
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert f"images/{STARTED}: content; the table is committed anew" in result.output


def test_where_the_note_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipray.errors import ClipRayError

    def refuse(*_: object) -> None:
        raise ClipRayError("images/_damaged.json could not be written: Read-only file system")

    flip(run / "images/part-000000.parquet", 99)
    monkeypatch.setattr(tables, "note_damaged", refuse)
    (check,) = (check for check in verify(run) if check.broken)
    assert "Read-only" in check.note
    assert "not noted for the next run" in CliRunner().invoke(app, ["verify", str(run)]).output


def test_a_run_on_s3(s3: str) -> None:
    output = Folder(f"{s3}/verified")
    write_run(output)
    assert set(states(output.url).values()) == {"whole"}
    for name, file in (("images", "part-000001.parquet"), ("index", "index-00112233.faiss")):
        data = bytearray(output.sub(name).read(file) or b"")
        data[300] ^= 16
        output.sub(name).write(file, bytes(data))
    found = {check.name: [broken.file for broken in check.broken] for check in verify(output.url)}
    assert (found["images"], found["index"]) == (["part-000001.parquet"], ["index-00112233.faiss"])
    assert tables.noted_as_damaged(output.sub("images")) == ["part-000001.parquet"]
    with pytest.raises(DamagedError, match="has changed since it was built"):
        open_index("index", output.sub("index"))


def test_status_says_what_is_damaged(tmp_path: Path) -> None:
    output = Folder(str(tmp_path / "run"))
    write_run(output)
    assert {report.state for report in status(output.url)} == {"finished"}
    record = output.sub("images").read(tables.RECORD) or b""
    output.sub("images").write(tables.RECORD, record.replace(b"RN50", b"RN51"))
    tables.note_damaged(output.sub("index"), ["index-00112233.faiss"])
    states = {report.name: (report.state, report.note) for report in status(output.url)}
    assert states["images"] == states["index"] == ("damaged", "`clipray run` repairs it")
    assert states["metrics"][0] == "finished"
