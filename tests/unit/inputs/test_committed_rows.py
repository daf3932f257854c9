"""Taking stock: whatever a kill or an edited manifest left behind, afterwards each row on disk is the manifest's, once."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray import tables
from clipray.errors import StaleTableError
from clipray.inputs import committed_rows
from clipray.inputs.committed_rows import (
    REFUSED,
    CommittedRows,
    RegionFolders,
    check_committed,
    regions_of_another,
    take_back,
)
from clipray.inputs.key_index import hash_strings
from clipray.inputs.manifest import open_manifest
from clipray.inputs.row_index import RowIndex, scan
from clipray.storage.events import Events, read_events
from clipray.storage.folder import Folder

PRINT = "0123456789abcdef"
STAMP = {"fingerprint": PRINT, "model": "m"}
EXTRA = [pa.field("label", pa.string())]


class Run:
    """A run's folder with a manifest of `count` rows; rows are named by their number."""

    def __init__(self, home: Path, count: int, keep: Sequence[str] = ()) -> None:
        self.home, self.keep = home, list(keep)
        self.table, self.rejects = Folder(f"{home}/images"), Folder(f"{home}/rejects/images")
        self.manifest(range(count))

    def manifest(self, numbers: Sequence[int], moved: Sequence[int] = (), relabelled: Sequence[int] = ()) -> None:
        columns = {
            "image_id": [f"id{n}" for n in numbers],
            "uri": [f"/new/{n}" if n in moved else f"/p/{n}" for n in numbers],
            "label": ["duck" if n in relabelled else "hen" for n in numbers],
        }
        pq.write_table(pa.table(columns, pa.schema([(c, pa.string()) for c in columns])), self.home / "part-m.parquet")
        self.scan: RowIndex = scan(open_manifest(str(self.home / "part-m.parquet"), self.keep), self.keep)

    def shard(self, name: str, numbers: Sequence[int], stamp: dict[str, Any] = STAMP) -> None:
        schema = tables.arrow_schema("images", {"clip": 2}, extra=EXTRA if self.keep else ())
        vectors = np.array([[n, -n] for n in numbers], np.float32).reshape(-1, 2)
        columns = {
            "image_id": [f"id{n}" for n in numbers],
            "uri": [f"/p/{n}" for n in numbers],
            "height": pa.array([1] * len(numbers), pa.int32()),
            "width": pa.array([1] * len(numbers), pa.int32()),
            "clip": pa.FixedSizeListArray.from_arrays(vectors.ravel(), type=schema.field("clip").type),
            **({"label": ["hen"] * len(numbers)} if self.keep else {}),
        }
        tables.write_shard(self.table, name, "images", pa.table(columns, schema), stamp)

    def reject(self, name: str, rows: Sequence[tuple[int, str]]) -> None:
        values = [
            {"image_id": f"id{n}", "uri": f"/p/{n}", "stage": "fetch", "reason": reason, "message": "m"}
            for n, reason in rows
        ]
        data = pa.Table.from_pylist(values, schema=tables.rejects_schema("image_id", "uri"))
        tables.write_shard(self.rejects, name, "rejects", data, STAMP)

    def stock(self, *, repair: bool = True) -> CommittedRows:
        return check_committed(self.table, self.rejects, self.scan, self.keep, PRINT, repair=repair)

    def done(self, stock: CommittedRows) -> list[int]:
        """The numbers of the manifest's rows that are marked as done."""
        found = set(self.scan.keys[stock.done].tolist())
        ids = pq.read_table(self.home / "part-m.parquet")["image_id"]
        keys = hash_strings(ids, self.scan.index.seed).tolist()
        return sorted(int(i[2:]) for i, key in zip(ids.to_pylist(), keys, strict=True) if key in found)

    def on_disk(self, folder: Folder | None = None) -> dict[str, list[int]]:
        folder = folder or self.table
        return {
            name: [int(i[2:]) for i in tables.read_shard(folder, name)["image_id"].to_pylist()]
            for name in tables.shard_names(folder)
        }

    def bytes_of(self) -> dict[str, bytes]:
        files = [p for p in self.home.rglob("*") if p.is_file()]
        return {str(p.relative_to(self.home)): p.read_bytes() for p in files}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, 20)


def test_nothing_is_there(run: Run) -> None:
    stock = run.stock()
    assert (stock.rows, stock.rejected, stock.files, stock.repaired) == (0, 0, [], {})
    assert run.done(stock) == []
    assert len(stock.done) == 20


def test_what_is_written_and_rejected_is_taken(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 2])
    run.shard("part-b.parquet", [7, 5])
    run.reject("part-r.parquet", [(9, "empty"), (10, "truncated"), (11, "empty")])
    before = run.bytes_of()
    stock = run.stock()
    assert run.done(stock) == [0, 1, 2, 5, 7, 9, 10, 11]
    assert [(s.name, s.rows, s.bytes) for s in stock.files] == [
        (name, rows, len(before[f"images/{name}"])) for name, rows in (("part-a.parquet", 3), ("part-b.parquet", 2))
    ]
    assert [(s.name, s.rows) for s in stock.reject_files] == [("part-r.parquet", 3)]
    assert stock.rejects == {"empty": 2, "truncated": 1}
    assert (stock.rows, stock.rejected, stock.repaired) == (5, 3, {})
    assert run.bytes_of() == before


@pytest.mark.parametrize("keep", [0, 4, 500, -1, -200])
def test_a_torn_shard_is_removed(run: Run, keep: int) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.shard("part-b.parquet", [2, 3])
    run.reject("part-r.parquet", [(4, "empty")])
    for folder, name in ((run.table, "part-b.parquet"), (run.rejects, "part-r.parquet")):
        folder.write(name, (folder.read(name) or b"")[:keep])
    stock = run.stock()
    assert stock.repaired == {"torn_files": 2}
    assert run.on_disk() == {"part-a.parquet": [0, 1]}
    assert run.on_disk(run.rejects) == {}
    assert run.done(stock) == [0, 1]
    assert run.stock().repaired == {}


def test_leftovers_of_a_killed_writer_are_removed(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.table.write(".tmp-0123", b"half a file")
    run.rejects.write(".tmp-4567", b"")
    run.table.write("_started.json", b"{}")
    stock = run.stock()
    assert run.table.sizes().keys() == {"part-a.parquet", "_started.json"}
    assert run.rejects.sizes() == {}
    assert (run.done(stock), stock.repaired) == ([0, 1], {})


def test_rows_that_stand_twice_are_kept_once(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 0, 2])
    run.shard("part-b.parquet", [2, 3])
    run.shard("part-c.parquet", [0, 3])
    stock = run.stock()
    assert run.on_disk() == {"part-a.parquet": [0, 1, 2], "part-b.parquet": [3]}
    assert (stock.rows, stock.repaired) == (4, {"rows_doubled": 4})
    assert [(s.name, s.rows) for s in stock.files] == [("part-a.parquet", 3), ("part-b.parquet", 1)]
    assert {s.name: s.bytes for s in stock.files} == run.table.sizes()
    assert run.done(stock) == [0, 1, 2, 3]
    assert run.stock().repaired == {}


def test_a_rewritten_shard_keeps_its_values_and_its_stamp(run: Run) -> None:
    run.shard("part-a.parquet", [4, 5, 4])
    before = tables.shard_footer(run.table, "part-a.parquet")
    run.stock()
    after = tables.shard_footer(run.table, "part-a.parquet")
    assert (before[0], after[0]) == (3, 2)
    assert after[1:] == before[1:]
    assert tables.read_shard(run.table, "part-a.parquet")["clip"].to_pylist() == [[4, -4], [5, -5]]


def test_a_row_both_written_and_rejected_is_written(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.reject("part-r.parquet", [(1, "worker_died"), (2, "empty")])
    stock = run.stock()
    assert (stock.rows, stock.rejects, stock.repaired) == (2, {"empty": 1}, {"rows_doubled": 1})
    assert run.on_disk(run.rejects) == {"part-r.parquet": [2]}
    assert run.done(stock) == [0, 1, 2]


def test_rows_that_left_the_manifest_are_removed(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 2])
    run.shard("part-b.parquet", [18, 19])
    run.reject("part-r.parquet", [(3, "empty"), (17, "empty")])
    run.manifest(range(2, 17))
    stock = run.stock()
    assert run.on_disk() == {"part-a.parquet": [2]}
    assert run.on_disk(run.rejects) == {"part-r.parquet": [3]}
    assert (stock.repaired, stock.rejects) == ({"rows_gone": 5}, {"empty": 1})
    assert run.done(stock) == [2, 3]


def test_all_rows_left_the_manifest(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 2])
    run.reject("part-r.parquet", [(3, "empty")])
    run.manifest([])
    stock = run.stock()
    assert (stock.repaired, stock.rows, stock.rejected) == ({"rows_gone": 4}, 0, 0)
    assert run.on_disk() == run.on_disk(run.rejects) == {}


def test_rejects_that_may_pass_are_taken_back_and_lasting_ones_are_not(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.reject("part-r.parquet", [(2, "unreachable"), (3, "http_404"), (4, "http_503"), (5, "not_found")])
    run.reject("part-s.parquet", [(6, "timed_out"), (7, "http_429")])
    run.reject("part-t.parquet", [(8, "empty"), (9, "http_403")])
    run.reject(REFUSED, [(10, "duplicate_id")])
    before = run.bytes_of()
    assert take_back(run.rejects, "of other settings", {}) == 0
    assert run.bytes_of() == before
    assert take_back(run.rejects, PRINT, {}) == 4
    assert run.on_disk(run.rejects) == {"part-r.parquet": [3, 5], "part-t.parquet": [8, 9], REFUSED: [10]}
    after = run.bytes_of()
    for name in ("images/part-a.parquet", "rejects/images/part-t.parquet", f"rejects/images/{REFUSED}"):
        assert after[name] == before[name]
    stock = run.stock()
    assert run.done(stock) == [0, 1, 3, 5, 8, 9]
    assert (stock.repaired, stock.rejected) == ({}, 5)
    assert take_back(run.rejects, PRINT, {}) == 0


def test_a_kill_while_rejects_are_taken_back_loses_no_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("abc"):
        run.reject(f"part-{name}.parquet", [(2 * number, "unreachable"), (2 * number + 1, "empty")])

    for left in (2, 1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(
                committed_rows, "write_shard", Mock(wraps=tables.write_shard, side_effect=[DEFAULT, KeyboardInterrupt])
            )
            with pytest.raises(KeyboardInterrupt) if left else contextlib.nullcontext():
                take_back(run.rejects, PRINT, {})
        stock = run.stock()
        assert (stock.rejects, stock.repaired) == ({"empty": 3, **({"unreachable": left} if left else {})}, {})
        assert set(run.done(stock)) >= {1, 3, 5}
        assert len(run.done(stock)) == 3 + left


def test_a_broken_file_of_somebody_else_is_named_and_left(run: Run) -> None:
    run.table.write("mine.parquet", b"PAR1 and more")
    with pytest.raises(StaleTableError, match=r"images/mine\.parquet is no file of this table"):
        run.stock()
    assert "mine.parquet" in run.table.sizes()


def test_torn_rejects_are_left_to_taking_stock(run: Run) -> None:
    run.reject("part-r.parquet", [(2, "unreachable")])
    path = run.home / "rejects/images/part-r.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert take_back(run.rejects, PRINT, {}) == 0
    assert run.stock().repaired == {"torn_files": 1}


def test_rows_with_another_uri_are_made_again(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 2])
    run.reject("part-r.parquet", [(3, "unreachable"), (4, "unreachable")])
    run.manifest(range(20), moved=[1, 3])
    stock = run.stock()
    assert run.on_disk() == {"part-a.parquet": [0, 2]}
    assert run.on_disk(run.rejects) == {"part-r.parquet": [4]}
    assert (stock.repaired, stock.rejects) == ({"rows_changed": 2}, {"unreachable": 1})
    assert run.done(stock) == [0, 2, 4]


def test_rows_with_another_kept_value_are_made_again(tmp_path: Path) -> None:
    run = Run(tmp_path, 20, keep=["label"])
    run.shard("part-a.parquet", [0, 1, 2])
    run.reject("part-r.parquet", [(3, "empty")])
    assert (run.stock().repaired, run.stock().rows) == ({}, 3)
    run.manifest(range(20), relabelled=[1, 3])
    stock = run.stock()
    assert run.on_disk() == {"part-a.parquet": [0, 2]}
    assert (stock.repaired, stock.rejects) == ({"rows_changed": 1}, {"empty": 1})  # a reject holds no label
    assert run.done(stock) == [0, 2, 3]


def test_a_column_that_is_not_kept_may_change(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 2])
    run.manifest(range(20), relabelled=[1])
    assert (run.stock().repaired, run.stock().rows) == ({}, 3)


@pytest.mark.parametrize("kind", ["plain", "dictionary"])
def test_kept_strings_survive_the_way_through_a_shard(tmp_path: Path, kind: str) -> None:
    """A shard has a dictionary of its own; a null must not hash as one of its categories."""
    values = ["hen", None, "duck", "hen", None, "goose"]
    labels = pa.array(values, pa.string())
    labels = labels.dictionary_encode() if kind == "dictionary" else labels
    ids = [f"id{n}" for n in range(6)]
    pq.write_table(pa.table({"image_id": ids, "uri": ids, "label": labels}), tmp_path / "part-m.parquet")
    opened = open_manifest(str(tmp_path / "part-m.parquet"), ["label"])
    found = scan(opened, ["label"])
    table = Folder(f"{tmp_path}/images")
    schema = tables.arrow_schema("images", {"clip": 1}, extra=[opened.schema.field("label")])
    for number in range(0, 6, 2):
        columns = {
            "image_id": ids[number : number + 2],
            "uri": [f"{tmp_path}/{i}" for i in ids[number : number + 2]],
            "height": pa.array([1, 1], pa.int32()),
            "width": pa.array([1, 1], pa.int32()),
            "clip": pa.FixedSizeListArray.from_arrays(pa.array([0, 1], pa.float32()), type=schema.field("clip").type),
            "label": pa.array(values[number : number + 2], pa.string()).cast(schema.field("label").type),
        }
        tables.write_shard(table, f"part-{number}.parquet", "images", pa.table(columns, schema), STAMP)
    stock = check_committed(table, Folder(f"{tmp_path}/rejects/images"), found, ["label"], PRINT)
    assert (stock.repaired, stock.rows, stock.done.all()) == ({}, 6, True)


@pytest.mark.parametrize("where", ["table", "rejects"])
def test_parquet_of_somebody_else_is_refused(run: Run, where: str) -> None:
    folder = run.table if where == "table" else run.rejects
    Path(folder.path("")).mkdir(parents=True)
    pq.write_table(pa.table({"image_id": ["id0"], "uri": ["/p/0"], "reason": ["empty"]}), folder.path("part-x.parquet"))
    before = run.bytes_of()
    for repair in (True, False):
        with pytest.raises(
            StaleTableError, match=r"part-x.parquet was not made by this job with these settings; move it away"
        ):
            run.stock(repair=repair)
    assert run.bytes_of() == before


def test_shards_of_other_settings_are_refused(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.shard("part-b.parquet", [2], {**STAMP, "fingerprint": "other"})
    before = run.bytes_of()
    with pytest.raises(StaleTableError, match=r"part-b.parquet was not made by this job"):
        run.stock()
    assert run.bytes_of() == before


def test_the_manifests_own_rejects_are_counted_but_take_nothing(run: Run) -> None:
    rows = [
        {"image_id": i, "uri": None, "stage": "manifest", "reason": r, "message": "m"}
        for i, r in ((None, "null_id"), ("id3", "duplicate_id"), ("id3", "duplicate_id"))
    ]
    data = pa.Table.from_pylist(rows, schema=tables.rejects_schema("image_id", "uri"))
    tables.write_shard(run.rejects, REFUSED, "rejects", data, STAMP)
    run.reject("part-r.parquet", [(4, "empty")])
    stock = run.stock()
    assert stock.rejects == {"null_id": 1, "duplicate_id": 2, "empty": 1}
    assert (stock.rejected, run.done(stock), stock.repaired) == (4, [4], {})


def test_without_mending_nothing_is_touched(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1, 0])
    run.shard("part-b.parquet", [1, 2, 19])
    run.shard("part-c.parquet", [5])
    run.table.write("part-d.parquet", b"PAR1 torn")
    run.table.write(".tmp-1", b"left")
    run.reject("part-r.parquet", [(6, "empty"), (0, "empty")])
    run.manifest(range(19))
    before = run.bytes_of()
    looked = run.stock(repair=False)
    assert run.bytes_of() == before
    assert looked.repaired == {"torn_files": 1, "rows_doubled": 3, "rows_gone": 1}
    mended = run.stock()
    assert run.bytes_of() != before
    assert np.array_equal(looked.done, mended.done)
    assert (looked.rows, looked.rejects) == (mended.rows, mended.rejects) == (4, {"empty": 1})


def test_on_s3(tmp_path: Path, s3: str) -> None:
    run = Run(tmp_path, 20)
    run.table, run.rejects = Folder(f"{s3}/ledger/images"), Folder(f"{s3}/ledger/rejects/images")
    run.shard("part-a.parquet", [0, 1, 0])
    run.shard("part-b.parquet", [1, 2])
    run.table.write("part-c.parquet", b"PAR1")
    stock = run.stock()
    assert stock.repaired == {"rows_doubled": 2, "torn_files": 1}
    assert run.on_disk() == {"part-a.parquet": [0, 1], "part-b.parquet": [2]}
    assert run.done(stock) == [0, 1, 2]


@pytest.mark.parametrize("torn", ["", '{"event": "torn', '{"event": "tornü'])
def test_the_log_goes_on_after_a_torn_line(tmp_path: Path, torn: str) -> None:
    folder = Folder(f"{tmp_path}/run")
    assert read_events(folder) == []
    Events(folder).write("first", rows=3, name="ü")
    with open(folder.path("events.jsonl"), "ab") as file:
        file.write(torn.encode()[:-1])  # in the middle of a letter
    Events(folder).write("second")
    events = Events(folder)
    events.write("third")
    assert [(e["event"], e.get("rows"), e.get("name")) for e in read_events(folder)] == [
        ("first", 3, "ü"),
        ("second", None, None),
        ("third", None, None),
    ]


def test_the_log_on_s3(s3: str) -> None:
    folder = Folder(f"{s3}/log")
    Events(folder).write("first")
    events = Events(folder)
    events.write("second")
    events.write("third")
    assert [e["event"] for e in read_events(folder)] == ["first", "second", "third"]


@pytest.mark.parametrize("seed", range(25))
def test_any_mess_ends_with_each_row_at_most_once(tmp_path: Path, seed: int) -> None:
    """Random shards that overlap, repeat, are torn or stale, on both sides; and taking stock again finds nothing to do."""
    rng = np.random.default_rng(seed)
    run = Run(tmp_path, 40, keep=["label"] if seed % 2 else [])
    torn = set()
    for number in range(int(rng.integers(1, 7))):
        rows = rng.integers(0, 40, rng.integers(1, 15)).tolist()
        run.shard(f"part-{number}.parquet", rows)
        if rng.random() < 0.2:
            whole = run.table.read(f"part-{number}.parquet") or b""
            run.table.write(f"part-{number}.parquet", whole[: rng.integers(0, len(whole))])
            torn.add(f"part-{number}.parquet")
    for number in range(int(rng.integers(0, 4))):
        run.reject(f"part-r{number}.parquet", [(int(n), "empty") for n in rng.integers(0, 40, rng.integers(1, 9))])
    there = {n for name in tables.shard_names(run.table) if name not in torn for n in _numbers(run.table, name)}
    thrown = {n for name in tables.shard_names(run.rejects) for n in _numbers(run.rejects, name)}
    left = sorted(rng.choice(40, 32, replace=False).tolist())
    moved = rng.choice(40, 4, replace=False).tolist()
    relabelled = rng.choice(40, 4, replace=False).tolist()
    run.manifest(left, moved, relabelled)

    stock = run.stock()

    written = Counter(n for rows in run.on_disk().values() for n in rows)
    refused = Counter(n for rows in run.on_disk(run.rejects).values() for n in rows)
    same = set(left) - set(moved)
    right = same - set(relabelled) if run.keep else same
    assert written == Counter(there & right)
    assert refused == Counter((thrown & same) - (there & right))
    assert run.done(stock) == sorted((written + refused).elements())
    assert (stock.rows, stock.rejected) == (written.total(), refused.total())
    assert stock.repaired.get("torn_files", 0) == len(torn)
    assert {s.name: s.bytes for s in stock.files} == run.table.sizes()
    after = run.bytes_of()
    again = run.stock()
    assert (again.repaired, run.bytes_of()) == ({}, after)
    assert np.array_equal(again.done, stock.done)


def _numbers(folder: Folder, name: str) -> list[int]:
    return [int(i[2:]) for i in tables.read_shard(folder, name, ["image_id"])["image_id"].to_pylist()]


# --- regions beside pictures


class Regional(Run):
    """A run whose pictures have regions: by default picture n has n % 3 of them, and every fifth has a refused box."""

    def __init__(self, home: Path, count: int) -> None:
        super().__init__(home, count)
        self.folders = RegionFolders(Folder(f"{home}/regions"), Folder(f"{home}/rejects/regions"))

    def pictures(self, name: str, numbers: Sequence[int]) -> None:
        counted = pa.field("region_count", pa.int32(), nullable=False)
        schema = tables.arrow_schema("images", {"clip": 1}, extra=[counted])
        columns = {
            "image_id": [f"id{n}" for n in numbers],
            "uri": [f"/p/{n}" for n in numbers],
            "height": pa.array([1] * len(numbers), pa.int32()),
            "width": pa.array([1] * len(numbers), pa.int32()),
            "clip": pa.FixedSizeListArray.from_arrays(pa.array(np.float32(numbers)), type=schema.field("clip").type),
            "region_count": pa.array([n % 3 for n in numbers], pa.int32()),
        }
        tables.write_shard(self.table, name, "images", pa.table(columns, schema), STAMP)

    def regions(self, name: str, numbers: Sequence[int], stamp: dict[str, Any] = STAMP) -> None:
        """A region for each number, as often as it stands there."""
        schema = tables.arrow_schema("regions", {"clip": 1})
        rows = [
            {
                "image_id": f"id{n}",
                "region_id": f"id{n}#g{i}",
                "box_xyxy": [0, 0, n, i],
                "scale": 1,
                "clipped": False,
                "clip": [n],
            }
            for i, n in enumerate(numbers)
        ]
        tables.write_shard(self.folders.table, name, "regions", pa.Table.from_pylist(rows, schema), stamp)

    def refused_boxes(self, name: str, numbers: Sequence[int], stamp: dict[str, Any] = STAMP) -> None:
        rows = [{"image_id": f"id{n}", "stage": "pool", "reason": "empty_box", "message": "m"} for n in numbers]
        data = pa.Table.from_pylist(rows, schema=tables.rejects_schema("image_id", "uri"))
        tables.write_shard(self.folders.rejects, name, "rejects", data, stamp)

    def whole(self, name: str, numbers: Sequence[int]) -> None:
        """What a step writes: regions, refused boxes, then the pictures."""
        if mine := [n for n in numbers for _ in range(n % 3)]:
            self.regions(name, mine)
        if refused := [n for n in numbers if n % 5 == 0]:
            self.refused_boxes(name, refused)
        self.pictures(name, numbers)

    def stock(self, *, repair: bool = True) -> CommittedRows:
        return check_committed(self.table, self.rejects, self.scan, (), PRINT, regions=self.folders, repair=repair)

    def assert_complete(self) -> None:
        """Every picture has its regions in the shard of its name, and every region and refused box its picture."""
        pictures, regions = self.on_disk(), self.on_disk(self.folders.table)
        assert {name: sorted(n for n in rows for _ in range(n % 3)) for name, rows in pictures.items()} == {
            name: sorted(regions.get(name, [])) for name in pictures
        }
        assert regions.keys() <= pictures.keys()
        for name, refused in self.on_disk(self.folders.rejects).items():
            assert set(refused) <= set(pictures[name])


@pytest.fixture
def regional(tmp_path: Path) -> Regional:
    return Regional(tmp_path, 20)


def test_whole_shards_with_regions_are_left_as_they_are(regional: Regional) -> None:
    regional.whole("part-a.parquet", [0, 1, 2, 5])
    regional.whole("part-b.parquet", [3, 6])  # no region at all
    before = regional.bytes_of()
    stock = regional.stock()
    assert (regional.done(stock), stock.repaired) == ([0, 1, 2, 3, 5, 6], {})
    assert [(s.name, s.rows, s.bytes) for s in stock.region_files] == [
        ("part-a.parquet", 5, len(before["regions/part-a.parquet"]))
    ]
    assert [(s.name, s.rows) for s in stock.rejected_box_files] == [("part-a.parquet", 2)]
    assert (stock.rejected, regional.bytes_of()) == (0, before)  # a refused box is no refused picture


@pytest.mark.parametrize("how", ["gone", "torn", "empty"])
def test_pictures_whose_regions_are_lost_are_made_again(regional: Regional, how: str) -> None:
    regional.whole("part-a.parquet", [0, 1, 2, 3])
    regional.whole("part-b.parquet", [4, 5])
    found = regional.folders.table.read("part-a.parquet") or b""
    if how == "gone":
        regional.folders.table.remove("part-a.parquet")
    else:
        regional.folders.table.write("part-a.parquet", found[:-9] if how == "torn" else b"")
    stock = regional.stock()
    assert regional.on_disk() == {"part-a.parquet": [0, 3], "part-b.parquet": [4, 5]}  # those without regions lack none
    assert regional.done(stock) == [0, 3, 4, 5]
    assert stock.repaired == {"rows_without_their_regions": 2, **({} if how == "gone" else {"torn_files": 1})}
    assert regional.on_disk(regional.folders.rejects) == {"part-a.parquet": [0], "part-b.parquet": [5]}
    regional.assert_complete()
    assert regional.stock().repaired == {}


@pytest.mark.parametrize("rows", [[1, 2, 4], [1, 2, 2, 2, 4], [1, 4, 7]], ids=["too few", "too many", "none"])
def test_a_picture_with_another_number_of_regions_is_made_again(regional: Regional, rows: list[int]) -> None:
    regional.whole("part-a.parquet", [1, 2, 4])
    regional.regions("part-a.parquet", rows)
    stock = regional.stock()
    assert regional.on_disk() == {"part-a.parquet": [1, 4]}
    assert regional.on_disk(regional.folders.table) == {"part-a.parquet": [1, 4]}
    assert regional.done(stock) == [1, 4]
    assert stock.repaired == {"rows_without_their_regions": 1}
    assert [s.rows for s in stock.region_files] == [2]
    assert regional.stock().repaired == {}


def test_regions_written_before_a_kill_are_removed(regional: Regional) -> None:
    """Regions and refused boxes come first: without the pictures' shard they are a kill's."""
    regional.whole("part-a.parquet", [1, 2])
    regional.regions("part-b.parquet", [4, 5, 5])
    regional.refused_boxes("part-b.parquet", [5])
    regional.folders.table.write(".tmp-1", b"half")
    regional.folders.rejects.write(".tmp-2", b"half")
    stock = regional.stock()
    assert (regional.done(stock), stock.repaired) == ([1, 2], {"region_files_removed": 2})
    assert regional.folders.table.sizes().keys() == {"part-a.parquet"}
    assert regional.folders.rejects.sizes().keys() == set()
    regional.assert_complete()


def test_regions_leave_with_their_picture(regional: Regional) -> None:
    regional.whole("part-a.parquet", [1, 2, 5, 10])
    regional.whole("part-b.parquet", [15, 16])
    before = tables.shard_footer(regional.folders.table, "part-a.parquet")
    regional.manifest([0, 1, 10, 11], moved=[1])
    stock = regional.stock()
    assert regional.on_disk() == {"part-a.parquet": [10]}
    assert regional.on_disk(regional.folders.table) == {"part-a.parquet": [10]}
    assert regional.on_disk(regional.folders.rejects) == {"part-a.parquet": [10]}
    assert stock.repaired == {"rows_gone": 4, "rows_changed": 1, "region_files_removed": 2}
    after = tables.shard_footer(regional.folders.table, "part-a.parquet")
    assert after[1:] == before[1:]
    assert {s.name: s.bytes for s in stock.region_files} == regional.folders.table.sizes()
    assert tables.read_shard(regional.folders.table, "part-a.parquet")["box_xyxy"].to_pylist() == [[0, 0, 10, 5]]


def test_a_picture_that_stands_twice_keeps_one_set_of_regions(regional: Regional) -> None:
    regional.whole("part-a.parquet", [1, 2])
    regional.whole("part-b.parquet", [2, 4])
    regional.whole("part-c.parquet", [1, 2, 7])
    regional.folders.table.remove("part-a.parquet")  # the first is not whole: the second is the one to keep
    stock = regional.stock()
    assert regional.on_disk() == {"part-b.parquet": [2, 4], "part-c.parquet": [1, 7]}
    assert stock.repaired == {"rows_without_their_regions": 2, "rows_doubled": 1}
    assert regional.done(stock) == [1, 2, 4, 7]
    regional.assert_complete()


def test_looking_at_regions_touches_nothing(regional: Regional) -> None:
    regional.whole("part-a.parquet", [1, 2])
    regional.regions("part-a.parquet", [1, 2])
    regional.regions("part-b.parquet", [4])
    before = regional.bytes_of()
    looked = regional.stock(repair=False)
    assert regional.bytes_of() == before
    assert regional.done(looked) == [1]
    assert regional.done(regional.stock()) == [1]


@pytest.mark.parametrize("where", ["table", "rejects"])
def test_regions_of_another_step_are_told_apart(regional: Regional, where: str) -> None:
    regional.whole("part-a.parquet", [1, 2, 5])
    assert regions_of_another(regional.folders, PRINT, "images") is None
    write = regional.regions if where == "table" else regional.refused_boxes
    folder = regional.folders.table if where == "table" else regional.folders.rejects
    write("part-b.parquet", [4], {**STAMP, "name": "images"})
    assert regions_of_another(regional.folders, PRINT, "images") is None
    assert regions_of_another(regional.folders, PRINT, "others") == folder.path("part-b.parquet")
    write("part-b.parquet", [4], {**STAMP, "fingerprint": "of other settings"})
    assert regions_of_another(regional.folders, PRINT, "images") == folder.path("part-b.parquet")
    folder.write("part-b.parquet", b"PAR1 torn by a kill")
    assert regions_of_another(regional.folders, PRINT, "images") is None
    pq.write_table(pa.table({"image_id": ["id4"]}), folder.path("part-b.parquet"))  # somebody's own
    assert regions_of_another(regional.folders, PRINT, "images") == folder.path("part-b.parquet")
    assert regions_of_another(RegionFolders(Folder("/nowhere/a"), Folder("/nowhere/b")), PRINT, "images") is None


@pytest.mark.parametrize("seed", range(15))
def test_after_any_mess_every_picture_has_its_regions(tmp_path: Path, seed: int) -> None:
    """Shards that overlap, regions lost, cut, torn, doubled or written without pictures; and then nothing to do."""
    rng = np.random.default_rng(seed)
    run = Regional(tmp_path, 40)
    for number in range(int(rng.integers(1, 7))):
        name, numbers = f"part-{number}.parquet", rng.choice(40, rng.integers(1, 15), replace=False).tolist()
        run.whole(name, numbers)
        regions = [n for n in numbers for _ in range(n % 3)]
        mess = rng.integers(0, 7)
        if mess == 0:
            run.folders.table.remove(name)
        elif mess == 1 and regions:
            run.regions(name, rng.choice(regions, max(1, len(regions) // 2)).tolist())
        elif mess == 2 and regions:
            whole = run.folders.table.read(name) or b""
            run.folders.table.write(name, whole[: rng.integers(0, len(whole))])
        elif mess == 3:
            run.table.remove(name)
        elif mess == 4:
            run.regions(name, [*regions, *rng.integers(0, 40, 5).tolist()])
    left = sorted(rng.choice(40, 32, replace=False).tolist())
    run.manifest(left, moved=rng.choice(40, 4, replace=False).tolist())
    looked = run.stock(repair=False)
    stock = run.stock()
    run.assert_complete()
    written = Counter(n for rows in run.on_disk().values() for n in rows)
    assert set(written.values()) <= {1}
    assert written.keys() <= set(left)
    assert run.done(stock) == run.done(looked) == sorted(written)
    assert {s.name: s.bytes for s in stock.region_files} == run.folders.table.sizes()
    assert {s.name: s.bytes for s in stock.rejected_box_files} == run.folders.rejects.sizes()
    after = run.bytes_of()
    assert (run.stock().repaired, run.bytes_of()) == ({}, after)


# --- files that have changed by themselves


def flip(folder: Folder, name: str, byte: int = 600) -> None:
    data = bytearray(folder.read(name) or b"")
    data[byte] ^= 4
    folder.write(name, bytes(data))


def test_a_damaged_shard_is_removed_though_its_ids_are_whole(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.shard("part-b.parquet", [2, 3])
    run.reject("part-r.parquet", [(4, "empty")])
    size = run.table.sizes()["part-b.parquet"]
    flip(run.table, "part-b.parquet", size - 300)  # in the footer, where no page's checksum sees it
    flip(run.rejects, "part-r.parquet", 9)
    stock = run.stock()
    assert stock.repaired == {"damaged_files": 2}
    assert (run.on_disk(), run.on_disk(run.rejects)) == ({"part-a.parquet": [0, 1]}, {})
    assert run.done(stock) == [0, 1]


def test_stock_knows_the_hash_of_each_shard(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.shard("part-b.parquet", [1, 2])
    run.reject("part-r.parquet", [(4, "empty")])
    stock = run.stock()  # b is written again, without its first row
    for folder, shards in ((run.table, stock.files), (run.rejects, stock.reject_files)):
        for shard in shards:
            assert shard == tables.verified(folder, shard.name)
            assert shard.sha256 == hashlib.sha256(folder.read(shard.name) or b"").hexdigest()


def test_what_is_verified_is_not_read_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.shard("part-a.parquet", [0, 1])
    verified: dict[str, tables.Shard] = {}
    before = check_committed(run.table, run.rejects, run.scan, (), PRINT, verified=verified)
    assert verified.keys() == {run.table.path("part-a.parquet")}
    run.shard("part-b.parquet", [2])
    seen = []
    verify = committed_rows.verify_shards
    monkeypatch.setattr(
        committed_rows, "verify_shards", lambda folder, names: seen.extend(names) or verify(folder, names)
    )  # fmt: skip
    after = check_committed(run.table, run.rejects, run.scan, (), PRINT, verified=verified)
    assert seen == ["part-b.parquet"]
    assert after.files[0] == before.files[0]


@pytest.mark.parametrize("where", ["table", "rejects"])
def test_pictures_are_made_again_with_their_damaged_regions(regional: Regional, where: str) -> None:
    regional.whole("part-a.parquet", [0, 1, 2, 5])
    regional.whole("part-b.parquet", [10, 11])
    flip(getattr(regional.folders, where), "part-a.parquet")
    stock = regional.stock()
    assert stock.repaired["damaged_files"] == 1
    assert regional.done(stock) == {"table": [0, 10, 11], "rejects": [10, 11]}[where]
    regional.assert_complete()


def test_looking_counts_no_shard_that_is_noted_as_damaged(run: Run) -> None:
    run.shard("part-a.parquet", [0, 1])
    run.shard("part-b.parquet", [2, 3])
    tables.note_damaged(run.table, ["part-b.parquet"])
    before = run.bytes_of()
    stock = run.stock(repair=False)
    assert (run.done(stock), [shard.name for shard in stock.files]) == ([0, 1], ["part-a.parquet"])
    assert run.bytes_of() == before
