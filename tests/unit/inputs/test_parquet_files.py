"""Parquet as others write it: found in folders, with the types of several writers, and with what no table can hold."""

from __future__ import annotations

import itertools
import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray.analysis.normalize import LONGEST, first_long_rows, surely_usable
from clipray.errors import ClipRayError, ManifestError, SchemaError
from clipray.inputs.classes import prompt_styles
from clipray.inputs.known_labels import read_labelled
from clipray.inputs.manifest import open_manifest, read_rows
from clipray.inputs.parquet_files import as_utf8, common_type, expand_parquet
from clipray.inputs.published_ground_truth import convert_ground_truth
from clipray.inputs.relevance import open_relevance, read_relevance
from clipray.inputs.row_index import SCAN_BYTES, SCAN_ROWS, row_keys, scan
from clipray.inputs.vector_column import VectorColumn, open_vectors, read_finite, read_ids, read_vectors
from clipray.job import Column
from clipray.job.load import load_job
from clipray.storage import parquet
from clipray.storage.folder import Folder
from clipray.storage.parquet import chunked, merge_neighbours


def write(path: Path, columns: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path, **options)
    return path


def some(*numbers: int, **more: Any) -> dict[str, Any]:
    return {"image_id": [f"id{n}" for n in numbers], "uri": [f"p/{n}.jpg" for n in numbers], **more}


def broken(*values: bytes) -> pa.Array:
    """Strings that need not be UTF-8; Parquet takes them."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def vectors_of(path: Path | str, **column: Any) -> VectorColumn:
    return open_vectors(Column(path=str(path), **{"column": "v", "id": "id", **column}), Folder("/nowhere"))


def rows_of(source: VectorColumn) -> dict[str, list[float]]:
    read = [read_vectors(source, row_group) for row_group in source.row_groups]
    return {name: v.tolist() for ids, x in read for name, v in zip(ids["id"].to_pylist(), x, strict=True)}


# --- which files


def test_hidden_folders_and_tables_of_runs_are_not_read(tmp_path: Path) -> None:
    expected = [write(tmp_path / name, some(n)) for n, name in enumerate(["a.parquet", "deep/b.pq", "z=1/c.parquet"])]
    for folder in (
        "_temporary/0",
        ".ipynb_checkpoints",
        "_delta_log",
        "deep/.x/deeper",
        "out/images",
        "out/rejects/images",
    ):
        write(tmp_path / folder / "part.parquet", some(9))
    write(tmp_path / "out/manifest.parquet", some(9))
    write(tmp_path / "begun/part.parquet", some(9))
    for name in ("out/images/_table.json", "out/events.jsonl", "begun/_started.json"):
        (tmp_path / name).write_text("{}")
    assert expand_parquet(str(tmp_path)) == sorted(map(str, expected))
    assert expand_parquet(f"{tmp_path}/out/images/") == [f"{tmp_path}/out/images/part.parquet"]
    assert expand_parquet(f"{tmp_path}/_temporary") == [f"{tmp_path}/_temporary/0/part.parquet"]
    assert expand_parquet(f"{tmp_path}/out/*.parquet") == [f"{tmp_path}/out/manifest.parquet"]
    assert expand_parquet(f"{tmp_path}/out") == [f"{tmp_path}/out/manifest.parquet"]  # beside the run's own
    (tmp_path / "out/manifest.parquet").unlink()
    with pytest.raises(ManifestError, match="out: no manifest there"):
        expand_parquet(f"{tmp_path}/out")


def test_the_same_on_object_storage(tmp_path: Path, s3: str) -> None:
    store = Folder(f"{s3}/hidden")
    data = write(tmp_path / "m.parquet", some(1)).read_bytes()
    for folder in ("", "deep", "_temporary/0", ".x", "out/images"):
        store.sub(folder).write("m.parquet", data) if folder else store.write("m.parquet", data)
    store.sub("out/images").write("_table.json", b"{}")
    assert expand_parquet(store.url) == [f"{store.url}/deep/m.parquet", f"{store.url}/m.parquet"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", some(1))
    write(tmp_path / "other/b.parquet", some(2))
    (tmp_path / "m/link").symlink_to(tmp_path / "other")
    (tmp_path / "m/again").symlink_to(tmp_path / "other")
    (tmp_path / "other/loop").symlink_to(tmp_path / "m")
    assert expand_parquet(f"{tmp_path}/m") == [f"{tmp_path}/m/a.parquet", f"{tmp_path}/m/again/b.parquet"]


def test_folders_that_are_named_as_files(tmp_path: Path) -> None:
    """As Spark writes them."""
    write(tmp_path / "x.parquet/part-0.parquet", some(1))
    write(tmp_path / "y.parquet", some(2))
    expected = [f"{tmp_path}/x.parquet/part-0.parquet", f"{tmp_path}/y.parquet"]
    assert expand_parquet(f"{tmp_path}/*.parquet") == expected
    assert expand_parquet(str(tmp_path)) == expected
    assert expand_parquet(f"{tmp_path}/**") == expected


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Opening one would wait for ever."""
    for name in ("m.parquet", "c.txt", "job.yaml", "gnd.pkl", "c.parquet"):
        os.mkfifo(tmp_path / name)
    folder = Folder(str(tmp_path))
    for read in (
        lambda: open_manifest(f"{tmp_path}/m.parquet"),
        lambda: open_manifest(str(tmp_path)),
        lambda: vectors_of(tmp_path / "m.parquet"),
        lambda: prompt_styles(f"{tmp_path}/c.txt"),
        lambda: prompt_styles(f"{tmp_path}/c.parquet"),
        lambda: load_job(f"{tmp_path}/job.yaml"),
        lambda: convert_ground_truth(f"{tmp_path}/gnd.pkl", f"{tmp_path}/out.parquet"),
        lambda: open_relevance(f"{tmp_path}/m.parquet", None, "image_id"),
        lambda: read_labelled(Column(path=f"{tmp_path}/m.parquet", column="label"), folder),
    ):
        with pytest.raises(ClipRayError, match="not a regular file"):
            read()


# --- footers


def test_a_footer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with the row groups: reading it for each of them is quadratic."""
    n = 300
    path = write(tmp_path / "m.parquet", some(*range(n)), row_group_size=1)
    vectors = write(
        tmp_path / "v.parquet", {"id": [f"i{k}" for k in range(n)], "v": [[1.0, k] for k in range(n)]}, row_group_size=1
    )
    footers, opened = [], pq.ParquetFile
    monkeypatch.setattr(parquet, "SETTLED_S", -1.0)

    def counted(source: Any, *args: Any, metadata: Any = None, **options: Any) -> Any:
        footers.append(metadata is None)
        return opened(source, *args, metadata=metadata, **options)

    monkeypatch.setattr(pq, "ParquetFile", counted)
    found = scan(open_manifest(str(path)))
    assert len(found.keys) == n
    assert len(found.row_group_keys) == n
    assert sum(footers) == 1
    assert len(footers) < 10  # nor is the file opened for each
    source = vectors_of(vectors)
    assert [len(read_ids(source, row_group)) for row_group in source.row_groups] == [1] * n
    assert len(rows_of(source)) == n
    assert sum(footers) == 2


def test_a_file_that_changed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for settled in (2.0, -1.0):  # within the same tick of the clock, and after it
        monkeypatch.setattr(parquet, "SETTLED_S", settled)
        for n in range(30):
            path = write(tmp_path / "m.parquet", some(n % 10, n % 7))
            if settled < 0:
                os.utime(path, ns=(n * 10**9, n * 10**9))
            (row_group,) = open_manifest(str(path)).row_groups
            (rows,) = read_rows(row_group, ["image_id"], 10)
            table = rows.table
            assert table["image_id"].to_pylist() == [f"id{n % 10}", f"id{n % 7}"]


def test_footers_that_are_held_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    footer = parquet.pq.read_metadata(write(tmp_path / "m.parquet", some(1)))
    held = parquet._Footers()
    for n in range(50):
        held.hold((n,), footer)
    assert sum(held.get((n,)) is not None for n in range(50)) == parquet.FOOTERS
    monkeypatch.setattr(parquet, "FOOTER_BYTES", 1)
    held.hold((50,), footer)
    assert [n for n in range(51) if held.get((n,))] == [50]


def test_small_row_groups_are_read_together(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", some(*range(10)), row_group_size=2)
    write(tmp_path / "m/b.parquet", some(*range(10, 13)), row_group_size=3)
    opened = open_manifest(f"{tmp_path}/m")
    row_groups = merge_neighbours(opened.row_groups, 6, 2**30)
    assert [(p.file, p.number, p.count, p.first_row, p.rows) for p in row_groups] == [
        (0, 0, 3, 0, 6), (0, 3, 2, 6, 4), (1, 0, 1, 0, 3),
    ]  # fmt: skip
    assert sum(p.bytes for p in row_groups) == opened.bytes
    read = [
        (p.file, rows.first, rows.table["image_id"].to_pylist())
        for p in row_groups
        for rows in read_rows(p, ["image_id"], 4)
    ]
    assert read == [
        (0, 0, ["id0", "id1", "id2", "id3"]), (0, 4, ["id4", "id5"]), (0, 6, ["id6", "id7", "id8", "id9"]), (1, 0, ["id10", "id11", "id12"]),
    ]  # fmt: skip
    assert merge_neighbours(opened.row_groups, 6, 1) == list(opened.row_groups)  # of large rows each alone
    apart = [opened.row_groups[n] for n in (0, 1, 3, 4)]
    assert [(p.number, p.count) for p in merge_neighbours(apart, 99, 2**30)] == [(0, 2), (3, 2)]
    assert merge_neighbours([], 6, 1) == []


def test_groups_are_those_of_a_plain_sum() -> None:
    rng = np.random.default_rng(3)
    row_groups = [type("P", (), {"rows": int(n)}) for n in rng.integers(1, 30, 500)]
    found = chunked(row_groups, 100)  # type: ignore[arg-type]
    assert [row_group for group in found for row_group in group] == row_groups
    sizes = [[row_group.rows for row_group in group] for group in found]
    assert all(sum(group) <= 100 for group in sizes)
    assert all(sum(a) + b[0] > 100 for a, b in itertools.pairwise(sizes))


# --- types of several writers

TEXT = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int16(), pa.large_string()),
)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        *(((kind, kind), kind) for kind in (TEXT[0], TEXT[1], TEXT[3], pa.int8(), pa.list_(pa.float32(), 2))),
        *(((kind, pa.string()), pa.string()) for kind in (TEXT[2], TEXT[3], pa.null())),
        ((pa.large_string(), pa.string()), pa.large_string()),
        ((TEXT[3], TEXT[4]), pa.large_string()),
        ((pa.string_view(), pa.string_view()), pa.string()),  # Arrow cannot filter views
        ((pa.int8(), pa.int64()), pa.int64()),
        ((pa.uint8(), pa.int8()), pa.int16()),
        ((pa.list_(pa.null()), pa.list_(pa.string())), pa.list_(pa.string())),
        ((pa.timestamp("us"), pa.timestamp("ns")), pa.timestamp("ns")),
        ((pa.int8(), pa.string()), None),
        ((pa.bool_(), pa.int8()), None),
        ((pa.timestamp("us", "UTC"), pa.timestamp("us")), None),
    ],
)  # fmt: skip
def test_a_type_that_holds_the_values_of_all(types: tuple[pa.DataType, ...], expected: pa.DataType | None) -> None:
    assert common_type(types) == expected


@pytest.mark.parametrize("kind", [*TEXT[1:], pa.null()], ids=str)
def test_parts_of_other_writers_go_together(tmp_path: Path, kind: pa.DataType) -> None:
    values = [None, None] if pa.types.is_null(kind) else ["hen", None]
    for a, b in ((0, 1), (1, 0)):
        write(tmp_path / f"m/{a}.parquet", some(1, 2, label=pa.array(["hen", None]).cast(pa.string())))
        write(
            tmp_path / f"m/{b}.parquet",
            some(3, 4, label=pa.array(values, pa.null() if pa.types.is_null(kind) else pa.string()).cast(kind)),
        )
        opened = open_manifest(f"{tmp_path}/m", ["label"])
        expected = opened.schema.field("label").type
        assert expected in (pa.string(), pa.large_string())
        labels = {}
        for row_group in opened.row_groups:
            for rows in read_rows(row_group, opened.columns(["label"]), 9, schema=opened.schema):
                assert rows.table.schema.field("label").type == expected
                labels.update(zip(*(rows.table[c].to_pylist() for c in ("image_id", "label")), strict=True))
        assert labels == {"id1": "hen", "id2": None, "id3": values[0], "id4": None}
        plain = write(tmp_path / "plain.parquet", some(1, 2, 3, 4, label=["hen", None, values[0], None]))
        expected_scan = scan(open_manifest(str(plain), ["label"]), ["label"])
        found = scan(opened, ["label"])
        assert np.array_equal(found.kept[np.argsort(found.keys)], expected_scan.kept[np.argsort(expected_scan.keys)])


def test_a_part_without_rows_may_have_any_types(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", {"image_id": pa.nulls(0), "uri": pa.nulls(0), "n": pa.array([], pa.string())})
    write(tmp_path / "m/b.parquet", some(1, n=[7]))
    pq.write_table(pa.table({}), tmp_path / "m/c.parquet")
    opened = open_manifest(f"{tmp_path}/m", ["n"])
    assert (opened.rows, len(opened.urls), opened.schema.field("n").type) == (1, 3, pa.int64())
    write(tmp_path / "v/a.parquet", {"id": pa.array([], pa.string()), "v": pa.array([], pa.list_(pa.float32()))})
    write(tmp_path / "v/b.parquet", {"id": ["x"], "v": pa.array([[1.0, 2.0]], pa.list_(pa.float32()))})
    pq.write_table(pa.table({}), tmp_path / "v/c.parquet")
    assert rows_of(vectors_of(tmp_path / "v")) == {"x": [1.0, 2.0]}


def test_a_fraction_that_cannot_hold_a_whole_number_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", some(1, n=[2**53 + 1]))
    write(tmp_path / "m/b.parquet", some(2, n=[0.5]))
    with pytest.raises(ManifestError, match=r"a.parquet: row group 0 cannot be read: Integer value 9007199254740993"):
        scan(open_manifest(f"{tmp_path}/m", ["n"]), ["n"])


def test_labels_and_answers_of_several_writers(tmp_path: Path) -> None:
    for n, kind in enumerate(TEXT):
        ids = pa.array([f"i{n}"]).cast(kind)
        write(tmp_path / f"l/{n}.parquet", {"image_id": ids, "label": pa.array(["hen"]).cast(kind)})
        write(tmp_path / f"r/{n}.parquet", {"query_id": ids, "image_id": ids})
        write(tmp_path / f"c/{n}.parquet", {"label": pa.array([f"class {n}"]).cast(kind)})
    for folder in "lrc":
        write(tmp_path / f"{folder}/x.parquet", {name: pa.nulls(0) for name in ("query_id", "image_id", "label")})
    labelled = read_labelled(Column(path=f"{tmp_path}/l", column="label"), Folder(str(tmp_path)))
    assert (len(labelled.index), labelled.names) == (len(TEXT), ("hen",))
    assert len(read_relevance(open_relevance(f"{tmp_path}/r", None, "image_id")).query) == len(TEXT)
    assert len(prompt_styles(f"{tmp_path}/c/[0-9].parquet")[0].labels) == len(TEXT)


# --- columns that cannot be read


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    names = ["image_id", "uri", "label", "label"]
    path = write(
        tmp_path / "m.parquet",
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["u"]), pa.array(["x"]), pa.array(["y"])], names=names),
    )
    assert scan(open_manifest(str(path))).rows == 1  # nobody reads them
    twice = "2 columns are named 'label'; rename or drop all but one"
    with pytest.raises(ManifestError, match=twice):
        open_manifest(str(path), ["label"])
    with pytest.raises(SchemaError, match=twice):
        read_labelled(Column(path=str(path), column="label"), Folder(str(tmp_path)))
    with pytest.raises(ClipRayError, match=twice):
        prompt_styles(str(path))
    v = pa.array([[1.0, 2.0]])
    path = write(
        tmp_path / "v.parquet",
        pa.Table.from_arrays([pa.array(["a"]), v, pa.array(["x"]), pa.array(["y"])], names=["id", "v", "n", "n"]),
    )
    assert rows_of(vectors_of(path)) == {"a": [1.0, 2.0]}
    write(path, pa.Table.from_arrays([pa.array(["a"]), v, v], names=["id", "v", "v"]))
    with pytest.raises(SchemaError, match="2 columns are named 'v'"):
        vectors_of(path)
    write(path, pa.Table.from_arrays([pa.array(["a"]), pa.array(["a"]), v], names=["id", "id", "v"]))
    with pytest.raises(SchemaError, match="2 columns are named 'id'"):
        vectors_of(path)


def test_a_folder_key_of_others_is_named_as_such(tmp_path: Path) -> None:
    write(tmp_path / "label=hen/part-0.parquet", {**some(1), "id": ["a"], "v": [[1.0]]})
    key = "'label' is a folder key of the path, not a column"
    with pytest.raises(SchemaError, match=key):
        vectors_of(tmp_path, id="label")
    with pytest.raises(SchemaError, match=key):
        read_labelled(Column(path=str(tmp_path), column="label"), Folder(str(tmp_path)))


# --- strings that are not UTF-8


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_rows_that_are_not_utf8_are_rejected(tmp_path: Path, kind: pa.DataType) -> None:
    bad = broken(b"a", b"caf\xe9", b"c", b"d").cast(kind)
    good = ["a", "b", "c", "d"]
    for name, shown, message in (
        ("image_id", {"image_id": r"caf\xe9", "uri": "/b"}, "column 'image_id' holds a string that is not UTF-8"),
        ("uri", {"image_id": "b", "uri": rf"{tmp_path}/caf\xe9"}, "column 'uri'"),
        ("label", {"image_id": "b", "uri": "/b"}, "column 'label'"),
    ):
        columns = {"image_id": good, "uri": [f"/{x}" for x in good], "label": good, name: bad}
        path = write(tmp_path / "m.parquet", columns)
        opened = open_manifest(str(path), ["label"])
        found = scan(opened, ["label"])
        (reject,) = found.rejects.to_pylist()
        assert {key: reject[key] for key in shown} == shown
        assert (reject["stage"], reject["reason"]) == ("manifest", "not_utf8")
        assert reject["message"].startswith(f"row 1 of {path}: ")
        assert message in reject["message"]
        assert (len(found.keys), {k: v.tolist() for k, v in found.rejected.items()}) == (3, {0: [1]})
        for rows in read_rows(opened.row_groups[0], opened.columns(["label"]), 10, schema=opened.schema):
            rows.table.drop_columns("label").validate(full=True)
    assert len(scan(open_manifest(str(path))).keys) == 4  # nobody reads the label


def test_a_dictionary_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Where its indices are narrow, Arrow does not read it."""
    narrow = broken(b"a", b"\xe9").cast(pa.dictionary(pa.int8(), pa.string()))
    path = write(tmp_path / "m.parquet", some(1, 2, label=narrow))
    with pytest.raises(ManifestError, match="row group 0 cannot be read: Invalid UTF8"):
        scan(open_manifest(str(path), ["label"]), ["label"])


def test_a_broken_string_within_a_kept_list(tmp_path: Path) -> None:
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3, 3], pa.int32()), broken(b"a", b"b", b"caf\xe9"))
    opened = open_manifest(str(write(tmp_path / "m.parquet", some(1, 2, 3, words=lists))), ["words"])
    found = scan(opened, ["words"])
    assert {k: v.tolist() for k, v in found.rejected.items()} == {0: [1]}
    (read,) = read_rows(opened.row_groups[0], opened.columns(["words"]), 9, schema=opened.schema)
    assert {name: rows.tolist() for name, rows in read.not_utf8.items()} == {"words": [False, True, False]}


def test_an_escaped_id_takes_no_place(tmp_path: Path) -> None:
    """The good row of that very name is encoded, and is no duplicate."""
    path = write(tmp_path / "m.parquet", {"image_id": broken(b"caf\xe9", rb"caf\xe9", b"b"), "uri": ["x", "y", "z"]})
    found = scan(open_manifest(str(path)))
    assert (len(found.keys), found.rejects["reason"].to_pylist()) == (2, ["not_utf8"])


def test_as_utf8() -> None:
    texts, bad = as_utf8(pa.chunked_array([broken(b"a", b"\xff\xfe", "ü".encode()), pa.array([None, "b"])]))
    assert (texts.to_pylist(), bad.tolist()) == (["a", r"\xff\xfe", "ü", None, "b"], [False, True, False, False, False])
    number = uuid.UUID(int=7)
    assert as_utf8(pa.chunked_array([pa.array([number.bytes, None], pa.uuid())]))[0].to_pylist() == [str(number), None]
    for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1)):
        texts, bad = as_utf8(pa.chunked_array([pa.array([b"x", b"a", None, b"\xe9"]).cast(kind).slice(1)]))
        assert (texts.to_pylist(), bad.tolist()) == (["a", None, r"\xe9"], [False, False, True])


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([uuid.UUID(int=n).bytes for n in (1, 2)], pa.uuid()), [str(uuid.UUID(int=n)) for n in (1, 2)]),
        (pa.array([1, 2]), ["1", "2"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array(["a", "b"]).cast(pa.string_view()), ["a", "b"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
    ],
    ids=lambda value: str(getattr(value, "type", "")),
)
def test_what_names_a_row(tmp_path: Path, ids: pa.Array, expected: list[str]) -> None:
    source = vectors_of(write(tmp_path / "v.parquet", {"id": ids, "v": [[1.0, 2.0]] * 2}))
    assert list(rows_of(source)) == expected
    assert read_ids(source, source.row_groups[0]).to_pylist() == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (pa.array([{"a": 1}, {"a": 2}]), r"column 'id' of .* is struct<a: int64>; expected what names a row"),
        (pa.array([[1], [2]]), r"column 'id' of .* is list<.*>; expected what names a row"),
        (pa.array([b"a", b"\xc8"]), r"row group 0, row 1: 'id' is not UTF-8: \\xc8"),
        (broken(b"a", b"caf\xe9"), r"row group 0, row 1: 'id' is not UTF-8: caf\\xe9"),
        (pa.array(["a", None]), r"row group 0 has rows without 'id'"),
    ],
    ids=["struct", "list", "bytes", "string", "null"],
)
def test_what_names_no_row(tmp_path: Path, ids: pa.Array, message: str) -> None:
    path = write(tmp_path / "v.parquet", {"id": ids, "v": [[1.0, 2.0]] * 2})
    with pytest.raises(SchemaError, match=message):
        rows_of(vectors_of(path))


# --- vectors that float32 cannot square


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("length", [1e30, 5e18, 3e38])
def test_vectors_that_are_too_long_are_refused(tmp_path: Path, kind: pa.DataType, length: float) -> None:
    v = pa.array([[1.0, 2.0], [length, -length], [0.0, 1e17]], pa.list_(kind))
    source = vectors_of(write(tmp_path / "v.parquet", {"id": ["a", "b", "c"], "v": v}))
    with pytest.raises(SchemaError, match=r"vectors that are longer than 4e\+18, id: 'b'; repair, scale or drop"):
        read_finite(source, source.row_groups[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_look_tells_vectors_that_are_usable(dtype: type) -> None:
    x = np.random.default_rng(0).normal(size=(50, 16)).astype(dtype)
    assert surely_usable(x)
    assert surely_usable(x[:0])
    for value in (np.nan, np.inf, -np.inf, 2 * LONGEST):
        x[7, 3] = value
        assert not surely_usable(x)
    assert not surely_usable(np.ones((2, 2), np.float16))  # whose squares are not finite


def test_long_rows_are_those_that_float32_cannot_square() -> None:
    x = np.full((4, 10_000), 3e16, np.float32)  # of length 3e18
    assert first_long_rows(x).tolist() == []
    x[[1, 3]] *= 2
    assert first_long_rows(x).tolist() == [1, 3]
    assert first_long_rows(x, 1).tolist() == [1]
    assert first_long_rows(-x.astype(np.float64)).tolist() == [1, 3]
    assert first_long_rows(np.full((2, 3), 6e4, np.float16)).tolist() == []
    assert first_long_rows(np.array([[1e300, 0.0]])).tolist() == [0]
    with np.errstate(over="raise"):
        np.square(2 * np.float32(LONGEST))  # of two opposite ones the distance


# --- kept columns

FAR = 253_402_300_800_000_000  # µs: the year 10000


@pytest.mark.parametrize(
    "values",
    [
        pa.array([FAR, FAR + 1, None], pa.timestamp("us")),
        pa.array([FAR, FAR + 1, None], pa.timestamp("us", "Europe/Berlin")),
        pa.array([4_000_000, 4_000_001, None], pa.date32()),
        pa.array([2**62, 2**61, None], pa.duration("s")),
        pa.array([[4_000_000], [4_000_001, None], None], pa.list_(pa.date32())),
        pa.array([{"t": FAR}, {"t": FAR + 1}, None], pa.struct([("t", pa.timestamp("us"))])),
        pa.array([[FAR, FAR], [FAR, 1], None], pa.list_(pa.timestamp("us"), 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_kept_values_that_python_does_not_have(tmp_path: Path, values: pa.Array) -> None:
    """Whoever reads such a table with Python would fail."""
    opened = open_manifest(str(write(tmp_path / "m.parquet", some(1, 2, 3, x=values))), ["x"])
    with pytest.raises(ManifestError, match=r"`keep` names 'x', .*, with a value that Python has not, .*: ") as caught:
        scan(opened, ["x"])
    assert "\n" not in str(caught.value)
    assert len(scan(opened).keys) == 3  # nobody keeps it


def test_kept_columns_that_no_table_can_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.parquet", some(1, x=[1]))
    monkeypatch.setattr("clipray.inputs.manifest.unwritable", lambda column: f"{column.name} is odd")
    with pytest.raises(ManifestError, match="`keep` names 'x', int64: x is odd"):
        open_manifest(str(path), ["x"])


def test_int96_is_whole_and_stays_as_it_was(tmp_path: Path) -> None:
    """In ns, as tables of before have it, where ns hold it; in µs where they would wrap round."""
    old = write(
        tmp_path / "a.parquet",
        some(1, t=pa.array([datetime(2024, 5, 6)], pa.timestamp("us"))),
        use_deprecated_int96_timestamps=True,
    )
    far = write(
        tmp_path / "b.parquet",
        some(2, t=pa.array([datetime(9999, 12, 31)], pa.timestamp("us"))),
        use_deprecated_int96_timestamps=True,
    )
    for sources, kind, years in (([old], "ns", [2024]), ([far], "us", [9999]), ([old, far], "us", [2024, 9999])):
        opened = open_manifest([str(path) for path in sources], ["t"])
        assert opened.schema.field("t").type == pa.timestamp(kind)
        read = [
            rows.table for p in opened.row_groups for rows in read_rows(p, ["image_id", "t"], 9, schema=opened.schema)
        ]
        assert {table.schema.field("t").type for table in read} == {pa.timestamp(kind)}
        assert [table["t"][0].as_py().year for table in read] == years
        as_ns = pa.table(some(1, t=pa.array([datetime(2024, 5, 6)], pa.timestamp("ns"))))
        same = row_keys(read[0], 0, ["t"])[2] == row_keys(as_ns, 0, ["t"])[2]
        assert same.tolist() == [kind == "ns"]


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", some(*range(100)), row_group_size=50, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[pq.read_metadata(path).row_group(1).column(0).data_page_offset + 30] ^= 4
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"m.parquet: row groups 0 to 1 cannot be read"):
        scan(open_manifest(str(path)))
    assert (SCAN_ROWS, SCAN_BYTES) == (131_072, 2**28)
