"""Files of others in the folders of our tables: none is removed, and the message names them. Damaged ones of ours are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray import tables
from clipray.errors import StaleTableError
from clipray.runner.fresh import delete_table
from clipray.steps.base import shard_writer
from clipray.steps.base.step import RunContext
from clipray.storage.folder import Folder
from clipray.tables import metrics


def write(folder: Folder, name: str, table: str = "label_classes", rows: int = 3) -> tables.Shard:
    schema = tables.arrow_schema("metrics")
    row = {"step": "a", "metric": "b", "value": 1.0, "group": None, "n": 1}
    data = pa.Table.from_pylist([row] * rows, schema=schema)
    shard = tables.write_shard(folder, name, "metrics", data, {"fingerprint": "f"})
    if table != "metrics":
        stamped = tables.read_shard(folder, name).replace_schema_metadata(
            {"clipray": f'{{"table": "{table}", "fingerprint": "f"}}'}
        )
        pq.write_table(stamped, folder.path(name))
    return shard


FOREIGN: dict[str, Any] = {"plain": None, "of another table": "clusters", "torn": b"PAR1 and more"}


@pytest.fixture(params=FOREIGN)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A table of one shard of ours, and a foreign Parquet file."""
    folder, foreign = Folder(str(tmp_path / "out" / "table")), FOREIGN[request.param]
    shard = write(folder, "part-000000.parquet", "metrics")
    tables.commit(
        folder, "metrics", tables.arrow_schema("metrics"), [shard],
        fingerprint="f", inputs={}, settings={}, provenance={},
    )  # fmt: skip
    if foreign is None:
        pq.write_table(pa.table({"mine": [1]}), folder.path("mine.parquet"))
    elif isinstance(foreign, bytes):
        folder.write("mine.parquet", foreign)
    else:
        write(folder, "mine.parquet", foreign)
    return folder


MESSAGE = r"table/mine\.parquet is no file of this table that clipray wrote; move it away"


def test_a_table_with_a_foreign_file_is_not_cleared(folder: Folder) -> None:
    before = folder.sizes()
    with pytest.raises(StaleTableError, match=MESSAGE):
        tables.clear(folder, "metrics")
    assert folder.sizes() == before
    folder.remove("mine.parquet")
    tables.clear(folder, "metrics")
    assert folder.sizes() == {}


def test_parts_refuse_a_foreign_file(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Step:
        table, table_type, shard_metadata, name, total = folder, "metrics", {}, "table", 3

    monkeypatch.setattr("clipray.engine.tasks.map_tasks", lambda *_: [])
    run = RunContext(lambda: pytest.fail("no cluster is needed"), None, None, None)  # type: ignore[arg-type]
    with pytest.raises(StaleTableError, match=MESSAGE):
        shard_writer.write_parts(Step(), [], lambda *_: [], None, run, "making")  # type: ignore[arg-type]
    assert folder.sizes().keys() == {"part-000000.parquet", "mine.parquet", tables.RECORD}


def test_fresh_leaves_a_foreign_file(folder: Folder) -> None:
    if tables.shard_names(folder) and "mine.parquet" in folder.sizes():
        pq.write_table(pa.table({"mine": [1]}), folder.path("mine.parquet"))
    with pytest.raises(StaleTableError, match=MESSAGE):
        delete_table(Folder(folder.url.rpartition("/")[0]), "table")
    assert {"part-000000.parquet", "mine.parquet"} <= folder.sizes().keys()


def test_what_is_noted_as_damaged_goes_with_the_note(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    shards = [write(folder, f"part-{n}.parquet", "metrics") for n in range(2)]
    record = tables.commit(
        folder, "metrics", tables.arrow_schema("metrics"), shards,
        fingerprint="f", inputs={}, settings={}, provenance={},
    )  # fmt: skip
    assert tables.intact(folder, record)
    assert not tables.is_broken(folder)
    tables.note_damaged(folder, ["part-1.parquet", "_table.json", "gone.parquet"])
    assert not tables.intact(folder, record)
    assert tables.is_broken(folder)
    tables.reopen(folder)
    assert folder.sizes().keys() == {"part-0.parquet"}


def test_a_damaged_note_drops_nothing(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write(folder, "part-0.parquet", "metrics")
    folder.write(tables.DAMAGED, b'{"files": ["part-0.parquet"')
    assert tables.noted_as_damaged(folder) == []
    tables.reopen(folder)
    assert folder.sizes().keys() == {"part-0.parquet"}


def test_metrics_that_are_damaged_are_left_out_until_their_step_measures_again(tmp_path: Path) -> None:
    output, made = Folder(str(tmp_path)), {"fingerprint": "f"}
    folder = output.sub("metrics")
    for step in ("first", "second"):
        metrics.write_metrics(output, step, [metrics.Metric("recall", 1.0)], made)
    data = bytearray((tmp_path / "metrics/first.parquet").read_bytes())
    data[200] ^= 1
    (tmp_path / "metrics/first.parquet").write_bytes(data)
    pq.write_table(pa.table({"mine": [1]}), folder.path("mine.parquet"))
    folder.write(tables.RECORD, b"{")
    metrics.repair_metrics(output)
    record = tables.read_record(folder)
    assert record is not None
    assert [file["name"] for file in record.files] == ["second.parquet"]
    assert (metrics.are_damaged(output, "first"), metrics.are_damaged(output, "second")) == (True, False)
    metrics.write_metrics(output, "second", [metrics.Metric("recall", 0.5)], made)
    assert metrics.are_damaged(output, "first")
    metrics.write_metrics(output, "first", [metrics.Metric("recall", 0.7)], made)
    assert not metrics.are_damaged(output, "first")
    assert tables.noted_as_damaged(folder) is None
    assert "mine.parquet" in folder.sizes()


def test_a_build_clears_its_own_files_alone(tmp_path: Path) -> None:
    from clipray.engine.index_builder import _aside, _clear

    building = tmp_path / "_building"
    for name in ("000003.faiss", "index-00112233.faiss", "index-00112233.faiss.lists", "mine.faiss"):
        (building / name).parent.mkdir(exist_ok=True)
        (building / name).write_bytes(b"")
    assert [file.name for file in _aside(Folder(str(tmp_path))).iterdir()] == ["mine.faiss"]
    _clear(building)
    assert (building / "mine.faiss").exists()
    (building / "mine.faiss").unlink()
    _clear(building)
    assert not building.exists()
