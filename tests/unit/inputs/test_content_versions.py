"""Content that is exchanged under the same ids: which rows on disk are no longer the manifest's, and what is read to know it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray import tables
from clipray.inputs.committed_rows import CommittedRows, RegionFolders, check_committed
from clipray.inputs.content_versions import CONTENT_HASH, Contents, hash_contents, source_versions, with_contents
from clipray.inputs.key_index import KeyIndex, hash_strings
from clipray.inputs.manifest import open_manifest
from clipray.inputs.row_index import RowIndex, scan
from clipray.job.row_spec import REGION_IMAGES
from clipray.steps.base.comparison import Comparison
from clipray.steps.base.encode_run import step_rows
from clipray.storage.folder import Folder, listed_version, versions_by_url

INLINE = Contents("bytes")
STAMP = {"fingerprint": "0123456789abcdef"}
Row = tuple[str, str | None, bytes | None]  # id, uri, bytes


def oracle(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).digest()[:16].hex()


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    schema = pa.schema({"image_id": pa.string(), "uri": pa.string(), "bytes": pa.binary()})
    columns = [list(column) for column in zip(*rows, strict=True)]
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=3)


class Table:
    """A table of rows with their contents' hashes, its rejects, and a manifest in several files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.table, self.rejects = Folder(f"{home}/images"), Folder(f"{home}/rejects/images")
        (home / "m").mkdir()

    def manifest(self, file: str, rows: Sequence[Row]) -> None:
        write_manifest(self.home / "m" / file, rows)

    def write(self, name: str, rows: Sequence[Row]) -> None:
        schema = tables.arrow_schema("images", extra=[pa.field(CONTENT_HASH, pa.string())])
        values = [{"image_id": i, "uri": u, "height": 1, "width": 1, CONTENT_HASH: oracle(data)} for i, u, data in rows]
        tables.write_shard(self.table, name, "images", pa.Table.from_pylist(values, schema), STAMP)

    def reject(self, name: str, rows: Sequence[Row]) -> None:
        schema = tables.rejects_schema("image_id", "uri", CONTENT_HASH)
        why = {"stage": "decode", "reason": "truncated", "message": "m"}
        values = [{"image_id": i, "uri": u, CONTENT_HASH: oracle(data), **why} for i, u, data in rows]
        tables.write_shard(self.rejects, name, "rejects", pa.Table.from_pylist(values, schema), STAMP)

    def scan(self, changed: Sequence[str], contents: Contents = INLINE) -> RowIndex:
        """The scan with the contents of the files named `changed`."""
        manifest = open_manifest(str(self.home / "m"))
        numbers = {n for n, url in enumerate(manifest.urls) if os.path.basename(url) in changed}
        return with_contents(manifest, scan(manifest), contents, numbers)

    def stock(self, changed: Sequence[str], contents: Contents = INLINE) -> tuple[CommittedRows, set[str]]:
        """Take stock; the ids of rows that are left to do."""
        counted = self.scan(changed, contents)
        stock = check_committed(self.table, self.rejects, counted, (), STAMP["fingerprint"])
        left = set(counted.keys[~stock.done].tolist())
        ids = pa.concat_tables(pq.read_table(path, columns=["image_id"]) for path in (self.home / "m").iterdir())
        keys = hash_strings(ids["image_id"], counted.index.seed).tolist()
        return stock, {i for i, key in zip(ids["image_id"].to_pylist(), keys, strict=True) if key in left}

    def ids(self) -> set[str]:
        shards = [tables.read_shard(self.table, name) for name in tables.shard_names(self.table)]
        return {i for shard in shards for i in shard["image_id"].to_pylist()}


ROWS: list[Row] = [(i, None, i.encode() * 9) for i in "abcdefgh"]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two manifest files and two shards of rows, across each other; one row is rejected."""
    table = Table(tmp_path)
    table.manifest("0.parquet", ROWS[:4])
    table.manifest("1.parquet", ROWS[4:])
    table.write("x.parquet", [ROWS[0], ROWS[4], ROWS[2]])
    table.write("y.parquet", [ROWS[1], ROWS[5], ROWS[6], ROWS[7]])
    table.reject("x.parquet", [ROWS[3]])
    return table


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_hashes_are_of_the_bytes(kind: pa.DataType) -> None:
    values = [b"", b"a", None, os.urandom(100_000), b"a"]
    column = pa.chunked_array([values[:2], values[2:]], kind)
    assert hash_contents(column.slice(1)).to_pylist() == [oracle(data) for data in values[1:]]


def test_nothing_has_changed(table: Table) -> None:
    stock, left = table.stock(["0.parquet", "1.parquet"])
    assert (stock.rows, stock.rejected, stock.repaired, left) == (7, 1, {}, set())


def test_exchanged_rows_are_to_be_made_again(table: Table) -> None:
    table.manifest("0.parquet", [ROWS[0], ("b", None, b"other"), *ROWS[2:4]])
    table.manifest("1.parquet", [*ROWS[4:6], ("g", None, ROWS[7][2]), ("h", None, ROWS[6][2])])
    stock, left = table.stock(["0.parquet", "1.parquet"])
    assert left == {"b", "g", "h"}
    assert (stock.repaired, stock.rows, stock.rejects) == ({"rows_changed": 3}, 4, {"truncated": 1})
    assert table.ids() == set("acef")
    assert table.stock(["0.parquet", "1.parquet"])[0].repaired == {}


def test_only_the_files_that_changed_are_compared(table: Table) -> None:
    table.manifest("0.parquet", [("a", None, b"other"), *ROWS[1:4]])
    table.manifest("1.parquet", [("e", None, b"other"), *ROWS[5:]])
    assert table.stock(["1.parquet"])[1] == {"e"}
    assert table.stock([])[1] == {"e"}
    assert table.stock(["0.parquet"])[1] == {"a", "e"}


def test_a_rejected_row_whose_content_was_mended_is_tried_again(table: Table) -> None:
    table.manifest("0.parquet", [*ROWS[:3], ("d", None, b"whole now")])
    stock, left = table.stock(["0.parquet"])
    assert (left, stock.rejects, stock.repaired) == ({"d"}, {}, {"rows_changed": 1})


def test_bytes_that_come_or_go_beside_a_uri_are_a_change(tmp_path: Path) -> None:
    table = Table(tmp_path)
    rows: list[Row] = [("a", "/p/a", None), ("b", "/p/b", b"b"), ("c", "/p/c", None), ("d", "/p/d", b"d")]
    table.write("x.parquet", rows)
    table.manifest("0.parquet", rows)
    assert table.stock(["0.parquet"])[1] == set()
    table.manifest("0.parquet", [("a", "/p/a", b"a"), ("b", "/p/b", None), *rows[2:]])
    assert table.stock(["0.parquet"])[1] == {"a", "b"}


def test_a_manifest_that_has_no_bytes_any_more(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.write("x.parquet", [("a", "/p/a", b"a"), ("b", "/p/b", None)])
    table.manifest("0.parquet", [("a", "/p/a", None), ("b", "/p/b", None)])
    pq.write_table(pq.read_table(tmp_path / "m/0.parquet").drop_columns(["bytes"]), tmp_path / "m/0.parquet")
    assert table.stock(["0.parquet"], Contents(None))[1] == {"a"}


def test_of_rows_of_one_id_the_one_that_counts_is_compared(table: Table) -> None:
    table.manifest("1.parquet", [("a", None, b"a later row of this id"), *ROWS[4:], ("e", None, b"likewise")])
    assert table.stock(["0.parquet", "1.parquet"])[1] == set()


def test_versions_of_files_tell_when_they_must_be_read_again(table: Table) -> None:
    def versions() -> dict[str, str]:
        found = scan(open_manifest(str(table.home / "m"))).versions
        return {os.path.basename(url): version for url, version in found.items()}

    before = versions()
    assert before.keys() == {"0.parquet", "1.parquet"}
    assert versions() == before
    table.manifest("1.parquet", [("h", None, b"h" * 9), *ROWS[4:7]])
    after = versions()
    assert (after["0.parquet"], after["1.parquet"] != before["1.parquet"]) == (before["0.parquet"], True)


def test_the_version_of_a_link_is_that_of_the_file(table: Table) -> None:
    real, link = table.home / "real.parquet", table.home / "m" / "0.parquet"
    link.rename(real)
    link.symlink_to(real)
    before = versions_by_url([str(link)])
    os.utime(real, (1, 1))
    assert versions_by_url([str(link)]) != before


def test_a_file_of_which_only_the_size_is_known_is_always_read(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (listed_version({"size": 5}), listed_version({"size": 5, "Last-Modified": "Sat"})) == ("", "5 Sat")
    monkeypatch.setattr("clipray.inputs.row_index.versions_by_url", lambda urls: dict.fromkeys(urls, ""))
    table.manifest("1.parquet", [("a", None, b"a later row of this id"), *ROWS[4:]])
    first = comparison(table.home, None)
    assert comparison(table.home, first.facts(first.scan.versions)).changed_files == {0, 1}


def test_a_file_counts_as_changed_when_others_of_its_rows_count(table: Table) -> None:
    """`a` is in both files; when the first is gone, that of the second counts, though it has not been touched."""
    table.manifest("1.parquet", [("a", None, b"a later row of this id"), *ROWS[4:]])
    second = str(table.home / "m" / "1.parquet")
    both = scan(open_manifest(str(table.home / "m"))).versions
    alone = scan(open_manifest(second)).versions
    assert both[second] != alone[second]
    assert alone[second].split() == both[second].split()[:2]
    first = comparison(table.home, None)
    (table.home / "m" / "0.parquet").unlink()
    after = comparison(table.home, first.facts(first.scan.versions))
    stock = check_committed(table.table, table.rejects, after.scan_with_contents(), (), STAMP["fingerprint"])
    assert stock.repaired == {"rows_gone": 3, "rows_changed": 1}
    assert table.ids() == set("efgh")


def test_regions_follow_their_pictures(tmp_path: Path) -> None:
    home, kind = Table(tmp_path), REGION_IMAGES
    folders = RegionFolders(Folder(f"{tmp_path}/regions"), Folder(f"{tmp_path}/rejects/regions"))
    fields = [pa.field(CONTENT_HASH, pa.string())]
    pictures = [
        {"image_id": i, "uri": None, "height": 1, "width": 1, "region_count": 1, CONTENT_HASH: oracle(data)}
        for i, _, data in ROWS[:3]
    ]
    data = pa.Table.from_pylist(pictures, tables.arrow_schema(kind.table, extra=fields))
    tables.write_shard(home.table, "x.parquet", kind.table, data, STAMP)
    regions = [
        {"image_id": i, "region_id": f"{i}#b0", "box_xyxy": [0, 0, 1, 1], "clipped": False} for i, *_ in ROWS[:3]
    ]
    data = pa.Table.from_pylist(regions, tables.arrow_schema("regions"))
    tables.write_shard(folders.table, "x.parquet", "regions", data, STAMP)
    home.manifest("0.parquet", [ROWS[0], ("b", None, b"other"), ROWS[2]])
    manifest = open_manifest(f"{tmp_path}/m", spec=kind)
    stock = check_committed(home.table, home.rejects, with_contents(manifest, scan(manifest), INLINE, {0}), (), STAMP["fingerprint"], regions=folders)  # fmt: skip
    assert stock.done.sum() == 2
    assert tables.read_shard(folders.table, "x.parquet")["image_id"].to_pylist() == ["a", "c"]


def test_contents_cost_nothing_a_row_beside_the_hashes(table: Table) -> None:
    plain = scan(open_manifest(str(table.home / "m")))
    counted = table.scan(["0.parquet"])
    assert (counted.digest, counted.sources.nbytes, counted.sources.dtype) == (plain.digest, plain.sources.nbytes, np.uint64)  # fmt: skip
    assert (counted.sources != plain.sources).sum() == 4


SCHEMES = ("file", "s3")


def test_versions_of_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a b.jpg"
    path.write_bytes(b"12345")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    uris = [str(path), f"file://{tmp_path}/a%20b.jpg", f"FILE:{path}"]
    odd = ["/no/such/file.jpg", "", None, "http://127.0.0.1:9/a.jpg", f"zip://a::file://{path}", "a\0b", "odd://x/y"]
    assert source_versions([*uris, *odd], SCHEMES) == dict.fromkeys(uris, "5 1700000000123456789")
    assert source_versions(uris, ("s3",)) == {}


def test_versions_of_objects_are_seen_by_listings(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    import s3fs

    fs = s3fs.S3FileSystem()
    for name in ("x/a.jpg", "x/b.jpg", "y/c d.jpg"):
        fs.pipe(f"bucket/versions/{name}", name.encode())
    caplog.clear()
    uris = [f"{s3}/versions/{name}" for name in ("x/a.jpg", "x/b.jpg", "y/c d.jpg", "x/gone.jpg", "none/e.jpg")]
    before = source_versions([*uris, "s3://no-such-bucket/a.jpg"], SCHEMES)
    assert before.keys() == set(uris[:3])
    requests = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    for folder in ("x", "y"):
        assert len([line for line in requests if f"prefix=versions/{folder}/" in line]) == 1
    assert not [line for line in requests if ".jpg" in line]
    etag = hashlib.md5(b"x/a.jpg").hexdigest()
    assert before[uris[0]] == f'7 "{etag}"'
    s3fs.S3FileSystem(skip_instance_cache=True).pipe("bucket/versions/x/b.jpg", b"X/B.JPG")  # as another process would
    after = source_versions(uris, SCHEMES)
    assert {uri for uri in before if before[uri] != after[uri]} == {uris[1]}


def test_versions_of_a_manifest_on_object_storage_are_those_of_now(s3: str) -> None:
    import s3fs

    def write(data: list[bytes]) -> None:
        with s3fs.S3FileSystem(skip_instance_cache=True).open("bucket/m/0.parquet", "wb") as file:
            pq.write_table(pa.table({"image_id": ["a", "b"], "bytes": data}), file)

    def version() -> str:
        return scan(open_manifest(f"{s3}/m")).versions[f"{s3}/m/0.parquet"]

    write([b"a", b"b"])
    before = version()
    assert version() == before
    write([b"b", b"a"])
    assert version() != before


class Sources:
    """A table of rows whose files were looked at, and these files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.names = list("abcd")
        for name in self.names:
            (home / name).write_bytes(name.encode() * 5)
        pq.write_table(pa.table({"image_id": self.names, "uri": self.names}), home / "m.parquet")
        self.uris = {name: f"{home}/{name}" for name in self.names}
        versions = source_versions(self.uris.values(), SCHEMES)
        schema = tables.arrow_schema("images", extra=[pa.field(CONTENT_HASH, pa.string())])
        rows = [
            {"image_id": n, "uri": uri, "height": 1, "width": 1, CONTENT_HASH: versions[uri]}
            for n, uri in self.uris.items()
        ]
        tables.write_shard(Folder(f"{home}/images"), "x.parquet", "images", pa.Table.from_pylist(rows, schema), STAMP)

    def kept(self, contents: Contents) -> set[str]:
        """Ids of rows that stay after taking stock."""
        manifest = open_manifest(str(self.home / "m.parquet"))
        counted = with_contents(manifest, scan(manifest), contents, {0})
        table, rejects = Folder(f"{self.home}/images"), Folder(f"{self.home}/rejects/images")
        check_committed(table, rejects, counted, (), STAMP["fingerprint"])
        return set(tables.read_shard(table, "x.parquet")["image_id"].to_pylist())


def test_files_that_were_replaced_are_seen(tmp_path: Path) -> None:
    sources, look = Sources(tmp_path), Contents(None, SCHEMES)
    assert sources.kept(look) == set("abcd")
    (tmp_path / "b").write_bytes(b"longer than it was")
    info = (tmp_path / "c").stat()
    os.utime(tmp_path / "c", ns=(info.st_atime_ns, info.st_mtime_ns + 1))
    (tmp_path / "d").unlink()  # a row that is there is not lost with its file
    assert sources.kept(look) == set("ad")


def test_files_are_compared_with_what_they_were_when_the_run_began(tmp_path: Path) -> None:
    Sources(tmp_path)
    manifest = open_manifest(str(tmp_path / "m.parquet"))

    def look(before: dict[str, Any] | None) -> Comparison:
        return Comparison(manifest, scan(manifest), before, frozenset(), SCHEMES)

    first = look(None)
    facts = first.facts(first.scan.versions)
    (tmp_path / "b").write_bytes(b"while the run goes on")
    assert first.facts(first.scan.versions) == facts  # what is kept does not know of it, so that the next run compares
    assert (look(facts).changed, first.caveat) == (True, "")
    second = look(facts)
    assert not look(second.facts(second.scan.versions)).changed


def test_a_digest_of_another_hash_does_not_say_that_files_have_changed(tmp_path: Path) -> None:
    """It cannot be compared; the table's rows are counted, with what is known of their contents."""
    Sources(tmp_path)
    manifest = open_manifest(str(tmp_path / "m.parquet"))
    changed = [
        Comparison(manifest, scan(manifest), {"content_hash": True, **more}, frozenset(), SCHEMES).changed
        for more in ({"sources_digest": "0123456789abcdef"}, {"sources_digest": "xxh64:0123456789abcdef"}, {})
    ]
    assert changed == [False, True, True]


def test_rows_that_kill_their_worker_are_rejected_with_their_content(table: Table) -> None:
    counted = comparison(table.home, None)
    step: Any = SimpleNamespace(
        manifest=counted.manifest,
        scan=counted.scan,
        comparison=counted,
        hash_fields=[pa.field(CONTENT_HASH, pa.string())],
    )
    seed = counted.scan.index.seed
    wanted, _ = KeyIndex.of(hash_strings(pa.array(["b", "g"]), seed), seed)
    rows = step_rows(step, wanted).to_pylist()
    assert rows == [{"image_id": i, "uri": None, CONTENT_HASH: oracle(i.encode() * 9)} for i in "bg"]


def test_files_that_are_not_looked_at_any_more_leave_their_rows(tmp_path: Path) -> None:
    sources = Sources(tmp_path)
    (tmp_path / "b").write_bytes(b"longer than it was")
    assert sources.kept(Contents(None)) == set("abcd")


def comparison(home: Path, before: dict[str, Any] | None, *, named: Sequence[str] = (), schemes: Sequence[str] = ()) -> Comparison:  # fmt: skip
    """With the manifest of `table`."""
    manifest = open_manifest(str(home / "m"))
    return Comparison(manifest, scan(manifest), before, frozenset(named), tuple(schemes))


def test_the_table_that_is_there_decides_whether_contents_are_compared(table: Table) -> None:
    assert comparison(table.home, None).contents == INLINE
    assert comparison(table.home, {"content_hash": True}).contents == INLINE
    for begun in ({}, {"content_hash": False}):  # as by earlier versions
        earlier = comparison(table.home, begun)
        assert (earlier.contents, earlier.changed, earlier.facts(earlier.scan.versions)) == (None, False, {})
        assert earlier.scan_with_contents() is earlier.scan
    assert comparison(table.home, None, named=[CONTENT_HASH]).contents is None


def test_files_are_looked_at_only_where_there_are_no_bytes(table: Table, tmp_path: Path) -> None:
    inline = comparison(table.home, None, schemes=SCHEMES)
    assert inline.contents == INLINE
    assert "inline" in inline.caveat
    (tmp_path / "uris/m").mkdir(parents=True)
    pq.write_table(pa.table({"image_id": ["a"], "uri": ["/p/a"]}), tmp_path / "uris/m/0.parquet")
    uris = comparison(tmp_path / "uris", None, schemes=SCHEMES)
    assert uris.contents == Contents(None, SCHEMES)
    assert uris.caveat == "`check_sources`: 1 of 1 files cannot be seen: gone, not listed, or over http"
    assert comparison(tmp_path / "uris", None).contents is None
    begun = comparison(tmp_path / "uris", {"content_hash": False}, schemes=SCHEMES)
    assert (begun.contents, "--fresh" in begun.caveat) == (None, True)


def test_what_is_kept_of_a_run_tells_the_next_one_what_to_read(table: Table) -> None:
    first = comparison(table.home, None)
    assert (first.changed, first.scan_with_contents() is first.scan) == (False, True)  # no row is on disk
    before = first.facts(first.scan.versions)
    assert not comparison(table.home, before).changed
    (table.home / "m/0.parquet").rename(table.home / "m/7.parquet")
    table.manifest("1.parquet", [ROWS[5], ROWS[4], *ROWS[6:]])
    table.manifest("2.parquet", [("i", None, b"new")])
    second = comparison(table.home, before)
    assert [os.path.basename(second.manifest.urls[n]) for n in sorted(second.changed_files)] == ["1.parquet", "2.parquet", "7.parquet"]  # fmt: skip
    assert (second.changed, second.scan_with_contents().contents) == (True, True)
    (table.home / "m/2.parquet").unlink()
    third = comparison(table.home, second.facts(second.scan.versions))
    assert (third.changed, third.changed_files) == (False, frozenset())
    unknown = comparison(table.home, {"content_hash": True})
    assert len(unknown.changed_files) == 2
