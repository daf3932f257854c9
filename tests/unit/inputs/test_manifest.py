"""Manifests: made from folders anywhere, opened as anybody writes them, counted before work starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import AS_IT_IS

from clipray import tables
from clipray.errors import JobError, ManifestError
from clipray.inputs.key_index import KeyIndex, hash_strings, seed_of
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.manifest import Manifest, open_manifest, read_rows, resolve
from clipray.inputs.row_index import RowIndex, row_groups_with, row_keys, scan
from clipray.pipelines.decode import DecodedImage, load_image
from clipray.pipelines.spec import Limits

NAMES = ["hens/b.jpg", "hens/a.JPEG", "ducks/deep/d.png", "c.webp"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four pictures in nested folders, and files that are none."""
    folder = tmp_path / "photos"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "hens/a.jpg.bak").write_text("no picture")
    return folder


def rows_of(path: Path | str) -> list[dict[str, Any]]:
    opened = open_manifest(str(path))
    return [
        row
        for row_group in opened.row_groups
        for rows in read_rows(row_group, opened.schema.names, 2)
        for row in rows.table.to_pylist()
    ]


# --- making one


def test_of_a_folder(photos: Path) -> None:
    out = photos.parent / "m.parquet"
    assert make_manifest(str(photos), str(out)) == 4
    found = pq.read_table(out)
    assert found.schema.names == ["image_id", "uri"]
    assert found["image_id"].to_pylist() == ["c.webp", "ducks/deep/d.png", "hens/a.JPEG", "hens/b.jpg"]
    assert found["uri"].to_pylist() == [f"photos/{name}" for name in found["image_id"].to_pylist()]


def test_a_relative_source_and_a_relative_output(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    assert make_manifest("photos/", "m.parquet") == 4
    assert make_manifest(f"file://{photos}", "n.parquet") == 4
    assert [r["uri"] for r in rows_of("m.parquet")] == [str(photos / n) for n in sorted(NAMES)]
    assert rows_of("m.parquet") == rows_of("n.parquet")


def test_a_manifest_moves_together_with_its_pictures(photos: Path, tmp_path: Path) -> None:
    make_manifest(str(photos), str(photos / "m.parquet"))
    shutil.move(photos, tmp_path / "elsewhere")
    rows = rows_of(tmp_path / "elsewhere/m.parquet")
    assert [row["uri"] for row in rows] == [str(tmp_path / "elsewhere" / n) for n in sorted(NAMES)]
    assert all(isinstance(load_image(row["uri"], None, Limits(), AS_IT_IS), DecodedImage) for row in rows)


def test_pictures_elsewhere_have_absolute_uris(photos: Path, tmp_path: Path) -> None:
    make_manifest(str(photos), str(tmp_path / "manifests/m.parquet"))
    assert pq.read_table(tmp_path / "manifests/m.parquet")["uri"].to_pylist() == [
        str(photos / name) for name in sorted(NAMES)
    ]


@pytest.mark.parametrize(
    ("glob", "ids"),
    [
        ("photos/hens/*", ["a.JPEG", "b.jpg"]),
        ("photos/*/*.jpg", ["hens/b.jpg"]),
        ("photos/**", ["c.webp", "ducks/deep/d.png", "hens/a.JPEG", "hens/b.jpg"]),
        ("photos/hens/[ab].*", ["a.JPEG", "b.jpg"]),
        ("phot*/c.webp", ["photos/c.webp"]),
        ("photos/hens/?.jpg", ["b.jpg"]),
    ],
)
def test_of_a_glob(photos: Path, glob: str, ids: list[str]) -> None:
    out = photos.parent / "out/m.parquet"
    assert make_manifest(str(photos.parent / glob), str(out)) == len(ids)
    assert pq.read_table(out)["image_id"].to_pylist() == ids


def test_a_folder_whose_name_looks_like_a_glob(photos: Path, tmp_path: Path) -> None:
    shutil.move(photos, tmp_path / "photos [2024]*")
    assert make_manifest(str(tmp_path / "photos [2024]*"), str(tmp_path / "[m].parquet")) == 4
    assert [row["image_id"] for row in rows_of(tmp_path / "[m].parquet")] == sorted(NAMES)


@pytest.mark.parametrize(
    ("label", "labels"),
    [
        ("folder", ["photos", "deep", "hens", "hens"]),
        (r"^(\w+)/", [None, "ducks", "hens", "hens"]),
        (r"[^/.]+\.", ["c.", "d.", "a.", "b."]),
        (r"(x)?\.JPEG", [None, None, None, None]),
    ],
)
def test_labels(photos: Path, label: str, labels: list[str | None]) -> None:
    out = photos.parent / "m.parquet"
    make_manifest(str(photos), str(out), label=label)
    assert pq.read_table(out)["label"].to_pylist() == labels


def test_a_label_that_is_no_regular_expression(photos: Path) -> None:
    with pytest.raises(JobError, match=r"--label '\(': expected `folder` or a regular expression"):
        make_manifest(str(photos), str(photos / "m.parquet"), label="(")
    assert not (photos / "m.parquet").exists()


@pytest.mark.parametrize("source", ["nothing", "nothing/*.jpg", "empty", "photos/c.webp", "photos/c.webp/x"])
def test_no_pictures_there(photos: Path, source: str) -> None:
    (photos.parent / "empty").mkdir()
    with pytest.raises(ManifestError, match="no images there"):
        make_manifest(str(photos.parent / source), str(photos / "m.parquet"))


def test_on_memory(photos: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in NAMES:
        fs.pipe(f"/shelf/photos/{name}", (photos / name).read_bytes())
    try:
        assert make_manifest("memory://shelf/photos", "memory://shelf/m.parquet", label="folder") == 4
        rows = rows_of("memory://shelf/m.parquet")
        assert [row["image_id"] for row in rows] == sorted(NAMES)
        assert all(row["uri"].startswith("memory://") for row in rows)
        loaded = [load_image(row["uri"], None, Limits(schemes=("memory",)), AS_IT_IS) for row in rows]
        assert all(isinstance(picture, DecodedImage) for picture in loaded), loaded
    finally:
        fs.rm("/shelf", recursive=True)


def test_on_s3(photos: Path, s3: str) -> None:
    fs = fsspec.filesystem("s3")
    for name in NAMES:
        fs.pipe(f"bucket/shelf/photos/{name}", (photos / name).read_bytes())
    assert make_manifest(f"{s3}/shelf/photos/", f"{s3}/shelf/m.parquet") == 4
    assert make_manifest(f"{s3}/shelf/photos/hens/*", f"{s3}/shelf/glob/n.parquet") == 2
    rows = rows_of(f"{s3}/shelf/m.parquet")
    assert [row["uri"] for row in rows] == [f"s3://bucket/shelf/photos/{name}" for name in sorted(NAMES)]
    limits = Limits(schemes=("s3",))
    assert all(isinstance(load_image(row["uri"], None, limits, AS_IT_IS), DecodedImage) for row in rows)
    assert load_image(f"{s3}/no.jpg", None, limits, AS_IT_IS).reason == "not_found"
    small = Limits(schemes=("s3",), max_bytes=10)
    assert load_image(rows[0]["uri"], None, small, AS_IT_IS).reason == "too_many_bytes"
    assert [len(open_manifest(f"{s3}/shelf/{what}").urls) for what in ("*.parquet", "", "glob")] == [1, 2, 1]
    assert scan(open_manifest(f"{s3}/shelf")).rejects.num_rows == 0
    assert make_manifest(str(photos), f"{s3}/local.parquet") == 4  # local pictures, manifest elsewhere
    assert rows_of(f"{s3}/local.parquet")[0]["uri"] == str(photos / "c.webp")


# --- opening one


def write(path: Path, columns: dict[str, Any], *, group: int = 1_000_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def some(numbers: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"image_id": [f"id{n}" for n in numbers], "uri": [f"p/{n}.jpg" for n in numbers], **more}


def test_a_file_a_glob_a_folder_and_a_list_are_the_same_rows(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", some(range(5)), group=2)
    write(tmp_path / "m/deep/b.parquet", some(range(5, 8)))
    write(tmp_path / "m/_hidden.parquet", some(range(90, 99)))
    write(tmp_path / "m/.tmp-1.parquet", some(range(90, 99)))
    (tmp_path / "m/notes.txt").write_text("no Parquet")
    folder = str(tmp_path / "m")
    for source in (folder, f"{folder}/", f"file://{folder}", [f"{folder}/a.parquet", f"{folder}/deep/*"]):
        opened = open_manifest(source)
        assert opened.rows == 8
        assert opened.urls == (f"{folder}/a.parquet", f"{folder}/deep/b.parquet")
        assert [(p.file, p.number, p.first_row, p.rows) for p in opened.row_groups] == [
            (0, 0, 0, 2),
            (0, 1, 2, 2),
            (0, 2, 4, 1),
            (1, 0, 0, 3),
        ]
        assert opened.bytes > 0
        assert scan(opened).digest == scan(open_manifest(folder)).digest
    assert open_manifest(f"{folder}/a.parquet").rows == 5
    assert open_manifest(f"{folder}/**/[_b]*.parquet").rows == 3 + 9  # a glob says what it wants


def test_which_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {**some([1]), "bytes": [b"x"], "label": ["hen"], "more": [1]})
    assert open_manifest(str(path)).columns() == ["image_id", "uri", "bytes"]
    assert open_manifest(str(path), ["more"]).columns(["more"]) == ["image_id", "uri", "bytes", "more"]


@pytest.mark.parametrize(
    ("columns", "keep", "message"),
    [
        ({"id": ["a"], "uri": ["b"]}, [], "no column 'image_id'; found: id, uri"),
        (
            {"image_id": ["a"], "url": ["b"]},
            [],
            "expected a column `uri` or `bytes`: no column 'uri'; found: image_id, url",
        ),
        (some([1]), ["label"], "`keep`: no column 'label'; found: image_id, uri"),
        (
            {"image_id": [1.5], "uri": ["b"]},
            [],
            "column `image_id` is double; expected strings, whole numbers or UUIDs",
        ),
        ({"image_id": ["a"], "uri": [b"b"]}, [], "column `uri` is binary; expected string"),
        ({"image_id": ["a"], "bytes": ["b"]}, [], "column `bytes` is string; expected binary"),
        ({**some([1]), "bytes": [b"b"]}, ["bytes"], "`keep` names 'bytes'"),
    ],
)
def test_a_manifest_of_other_columns_is_refused(
    tmp_path: Path, columns: dict[str, Any], keep: list[str], message: str
) -> None:
    path = write(tmp_path / "m.parquet", columns)
    with pytest.raises(ManifestError) as caught:
        open_manifest(str(path), keep)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("source", ["nothing.parquet", "*.nothing", "empty", []])
def test_nothing_there(tmp_path: Path, source: str | list[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"no manifest (there|named): expected a Parquet file"):
        open_manifest(str(tmp_path / source) if source else source)


@pytest.mark.parametrize("content", [b"", b"image_id,uri\n1,a\n", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.parquet").write_bytes(content)
    with pytest.raises(ManifestError, match=r"m.parquet: not a readable Parquet file"):
        open_manifest(str(tmp_path / "m.parquet"))


def test_files_that_differ_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m/a.parquet", some([1], label=["hen"]))
    write(tmp_path / "m/b.parquet", some([2], label=[7]))
    assert open_manifest(str(tmp_path / "m")).rows == 2  # nobody reads `label`
    with pytest.raises(ManifestError, match=r"b.parquet: column 'label' is int64, but string in .*a.parquet"):
        open_manifest(str(tmp_path / "m"), ["label"])
    write(tmp_path / "m/b.parquet", {**some([2]), "bytes": [b"x"]})
    with pytest.raises(ManifestError, match=r"b.parquet: column 'bytes' is binary, but missing in .*a.parquet"):
        open_manifest(str(tmp_path / "m"))


IDS, URIS = ["a", "b", "ü", None], ["p/a", "/q/b", None, "s3://c/d"]
CAT = ["hen", None, "hen", "duck"]


def _by_arrow(kind: pa.DataType) -> Any:
    def write_with(path: Path) -> None:
        columns = [pa.array(values, pa.string()).cast(kind) for values in (IDS, URIS, CAT)]
        pq.write_table(pa.table(columns, names=["image_id", "uri", "label"]), path)

    return write_with


def _by_dictionary(path: Path) -> None:
    columns = [pa.array(values, pa.string()).dictionary_encode() for values in (IDS, URIS, CAT)]
    pq.write_table(pa.table(columns, names=["image_id", "uri", "label"]), path)


def _by_polars(path: Path) -> None:
    pl.DataFrame({"image_id": IDS, "uri": URIS, "label": CAT}).write_parquet(path)


def _by_polars_categories(path: Path) -> None:
    frame = pl.DataFrame({"image_id": IDS, "uri": URIS, "label": CAT})
    frame.with_columns(pl.col("label", "image_id").cast(pl.Categorical)).write_parquet(path)


def _by_pandas(path: Path) -> None:
    pd.DataFrame({"image_id": IDS, "uri": URIS, "label": CAT}).to_parquet(path)


def _by_pandas_categories(path: Path) -> None:
    frame = pd.DataFrame({"image_id": IDS, "uri": URIS, "label": CAT})
    frame.astype({"label": "category", "image_id": "category"}).to_parquet(path)


WRITERS = {
    "arrow string": _by_arrow(pa.string()),
    "arrow large_string": _by_arrow(pa.large_string()),
    "arrow string_view": _by_arrow(pa.string_view()),
    "arrow dictionary": _by_dictionary,
    "polars": _by_polars,
    "polars categories": _by_polars_categories,
    "pandas": _by_pandas,
    "pandas categories": _by_pandas_categories,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_strings_as_others_write_them(tmp_path: Path, writer: str) -> None:
    _by_arrow(pa.string())(tmp_path / "plain.parquet")
    WRITERS[writer](tmp_path / "m.parquet")
    opened = open_manifest(str(tmp_path / "m.parquet"), ["label"])
    (row_group,) = opened.row_groups
    (rows,) = read_rows(row_group, opened.columns(["label"]), 100)
    start, table = rows.first, rows.table
    assert start == 0
    assert [table.schema.field(name).type for name in ("image_id", "uri")] == [pa.string()] * 2
    assert table["image_id"].to_pylist() == IDS
    assert table["uri"].to_pylist() == [f"{tmp_path}/p/a", "/q/b", None, "s3://c/d"]
    assert table["label"].to_pylist() == CAT
    found, plain = scan(opened, ["label"]), scan(open_manifest(str(tmp_path / "plain.parquet"), ["label"]), ["label"])
    assert (found.rows, len(found.keys), found.rejects.num_rows) == (4, 3, 1)
    assert found.digest == plain.digest


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_inline_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    data = pa.array([b"\xff\xd8", None], pa.binary()).cast(kind)
    path = write(tmp_path / "m.parquet", {"image_id": ["a", "b"], "bytes": data})
    opened = open_manifest(str(path))
    assert opened.columns() == ["image_id", "bytes"]
    (rows,) = read_rows(opened.row_groups[0], opened.columns(), 10)
    table = rows.table
    assert table["bytes"].to_pylist() == [b"\xff\xd8", None]
    assert len(scan(opened).keys) == 2


def test_a_row_group_is_streamed_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", some(range(10)), group=6)
    opened = open_manifest(str(path))
    found = [
        (rows.first, rows.table["image_id"].to_pylist())
        for row_group in opened.row_groups
        for rows in read_rows(row_group, ["image_id"], 4)
    ]
    assert found == [(0, ["id0", "id1", "id2", "id3"]), (4, ["id4", "id5"]), (6, ["id6", "id7", "id8", "id9"])]


@pytest.mark.parametrize(
    ("uri", "manifest", "expected"),
    [
        ("a/b.jpg", "/data/m.parquet", "/data/a/b.jpg"),
        ("/a/b.jpg", "/data/m.parquet", "/a/b.jpg"),
        ("a.jpg", "s3://bucket/deep/m.parquet", "s3://bucket/deep/a.jpg"),
        ("http://h/a.jpg", "/data/m.parquet", "http://h/a.jpg"),
        (None, "/data/m.parquet", None),
        ("", "/data/m.parquet", ""),
        ("a b#?.jpg", "/m.parquet", "/a b#?.jpg"),
    ],
)
def test_relative_uris_stand_against_the_manifest(uri: str | None, manifest: str, expected: str | None) -> None:
    assert resolve(uri, manifest) == expected


# --- counting one


def scanned(path: Path | str, keep: Sequence[str] = ()) -> tuple[Manifest, RowIndex]:
    opened = open_manifest(str(path), keep)
    return opened, scan(opened, keep)


def test_a_clean_manifest(tmp_path: Path) -> None:
    _, found = scanned(write(tmp_path / "m.parquet", some(range(100)), group=7))
    assert (found.rows, len(found.keys), found.rejects.num_rows, found.rejected) == (100, 100, 0, {})
    assert np.all(found.keys[1:] > found.keys[:-1])
    ids = pa.table({"image_id": [f"id{n}" for n in range(100)], "uri": [f"{tmp_path}/p/{n}.jpg" for n in range(100)]})
    keys, uris, kept = row_keys(ids, found.index.seed)
    order = np.argsort(keys)
    assert np.array_equal(found.keys, keys[order])
    assert np.array_equal(found.sources, uris[order])
    assert np.array_equal(found.kept, kept)
    assert found.rejects.schema == tables.rejects_schema("image_id", "uri")


def test_null_empty_and_repeated_ids(tmp_path: Path) -> None:
    """Over two files and several row groups; of equal ids the first is kept, wherever the others stand."""
    write(tmp_path / "m/a.parquet", {"image_id": ["x", None, "y", "x", ""], "uri": list("01234")}, group=2)
    write(tmp_path / "m/b.parquet", {"image_id": ["z", "y", None, "x", "z"], "uri": list("56789")}, group=3)
    opened, found = scanned(tmp_path / "m")
    assert (found.rows, len(found.keys)) == (10, 3)
    assert {file: rows.tolist() for file, rows in found.rejected.items()} == {0: [1, 3, 4], 1: [1, 2, 3, 4]}
    a, b = opened.urls
    here = f"{tmp_path}/m"
    earlier = "stands in an earlier row, which is kept"
    assert [tuple(row.values()) for row in found.rejects.to_pylist()] == [
        (None, f"{here}/1", "manifest", "null_id", f"row 1 of {a}: no image_id"),
        ("x", f"{here}/3", "manifest", "duplicate_id", f"row 3 of {a}: image_id 'x' {earlier}"),
        (None, f"{here}/4", "manifest", "null_id", f"row 4 of {a}: no image_id"),
        ("y", f"{here}/6", "manifest", "duplicate_id", f"row 1 of {b}: image_id 'y' {earlier}"),
        (None, f"{here}/7", "manifest", "null_id", f"row 2 of {b}: no image_id"),
        ("x", f"{here}/8", "manifest", "duplicate_id", f"row 3 of {b}: image_id 'x' {earlier}"),
        ("z", f"{here}/9", "manifest", "duplicate_id", f"row 4 of {b}: image_id 'z' {earlier}"),
    ]
    tables.check("rejects", found.rejects, tables.rejects_schema("image_id", "uri"))
    uris = dict(zip(found.keys.tolist(), found.sources.tolist(), strict=True))
    kept = pa.table({"image_id": ["x", "y", "z"], "uri": [f"{here}/0", f"{here}/2", f"{here}/5"]})
    keys, expected, _ = row_keys(kept, found.index.seed)
    assert uris == dict(zip(keys.tolist(), expected.tolist(), strict=True))


def test_the_same_file_twice_is_all_duplicates(tmp_path: Path) -> None:
    path = str(write(tmp_path / "m.parquet", some(range(4))))
    found = scan(open_manifest([path, path]))
    assert (found.rows, len(found.keys), found.rejects["reason"].to_pylist()) == (8, 4, ["duplicate_id"] * 4)


def test_a_manifest_without_rows(tmp_path: Path) -> None:
    schema = pa.schema([("image_id", pa.string()), ("uri", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "m.parquet")
    opened, found = scanned(tmp_path / "m.parquet")
    assert (opened.rows, found.rows, len(found.keys), found.rejects.num_rows) == (0, 0, 0, 0)
    assert row_groups_with(opened, found, found.index) == []


def test_random_manifests_against_a_dictionary(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    for trial in range(15):
        ids = [None if n == 0 else f"i{n}" for n in rng.integers(0, 40, rng.integers(1, 80))]
        cuts = np.sort(rng.integers(0, len(ids) + 1, 2))
        parts = [p for p in np.split(np.array(ids, object), cuts) if len(p)]
        for number, part in enumerate(parts):
            columns = {
                "image_id": pa.array(part.tolist(), pa.string()),
                "uri": [f"/{number}/{n}" for n in range(len(part))],
            }
            write(tmp_path / f"{trial}/{number}.parquet", columns, group=int(rng.integers(1, 9)))
        _, found = scanned(tmp_path / f"{trial}")
        first: dict[str, str] = {}
        refused: dict[int, list[int]] = {}
        for number, part in enumerate(parts):
            for row, image_id in enumerate(part.tolist()):
                if image_id is None or image_id in first:
                    refused.setdefault(number, []).append(row)
                else:
                    first[image_id] = f"/{number}/{row}"
        assert {file: rows.tolist() for file, rows in found.rejected.items()} == refused
        expected = pa.table(
            {"image_id": list(first), "uri": list(first.values())},
            pa.schema([("image_id", pa.string()), ("uri", pa.string())]),
        )
        keys, uris, _ = row_keys(expected, found.index.seed)
        order = np.argsort(keys)
        assert np.array_equal(found.keys, keys[order])
        assert np.array_equal(found.sources, uris[order])
        assert sum(len(keys) for keys in found.row_group_keys) == len(found.keys)


def digest(
    folder: Path, columns: dict[str, Any], keep: Sequence[str] = (), *, cuts: Sequence[int] = (), group: int = 99
) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    table, starts = pa.table(columns), [0, *cuts]
    for number, (a, b) in enumerate(zip(starts, [*cuts, len(table)], strict=True)):
        write(folder / f"{number}.parquet", {n: table[n].slice(a, b - a) for n in table.column_names}, group=group)
    return scanned(folder, keep)[1].digest


def test_the_digest_is_of_the_rows(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    columns = some(range(20), label=["hen"] * 20, number=list(range(20)))
    base = digest(folder, columns, ["label", "number"])
    shuffled = {name: [values[n] for n in np.random.default_rng(0).permutation(20)] for name, values in columns.items()}
    assert digest(folder, columns, ["label", "number"], cuts=[3, 11], group=2) == base
    assert digest(folder, shuffled, ["label", "number"], cuts=[7]) == base
    assert digest(folder, {**columns, "other": [1] * 20}, ["label", "number"]) == base
    others = [
        digest(folder, {**columns, "uri": [*columns["uri"][:19], "other.jpg"]}, ["label", "number"]),
        digest(folder, {**columns, "label": ["hen"] * 19 + ["duck"]}, ["label", "number"]),
        digest(folder, {**columns, "label": ["hen"] * 19 + [None]}, ["label", "number"]),
        digest(folder, {**columns, "number": [*range(19), 7]}, ["label", "number"]),
        digest(folder, {**columns, "image_id": [*columns["image_id"][:19], "other"]}, ["label", "number"]),
        digest(folder, {name: values[:19] for name, values in columns.items()}, ["label", "number"]),
        digest(folder, {name: [*values, values[0]] for name, values in columns.items()}, ["label", "number"]),
        digest(folder, columns, ["label"]),
        digest(folder, columns),
    ]
    assert len({base, *others}) == 1 + len(others)
    assert digest(folder, {**columns, "label": ["duck"] * 20}) == others[-1]  # a column that is not kept


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, None, 3]),
        pa.array([1.5, None, float("nan")]),
        pa.array([b"a", None, b"c"]),
        pa.array([[1, 2], None, []]),
        pa.array([{"x": 1}, None, {"x": 2}]),
        pa.array([True, None, False]),
        pa.array(pd.to_datetime(["2024-01-01", None, "2024-01-03"])),
    ],
)
def test_kept_columns_of_any_type_are_hashed(tmp_path: Path, values: pa.Array) -> None:
    path = write(tmp_path / "m.parquet", some(range(3), extra=values))
    _, found = scanned(path, ["extra"])
    assert len(set(found.kept.tolist())) == 3
    assert scanned(path, ["extra"])[1].digest == found.digest


# --- hashes


def _weak_for(attempts: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In these attempts the hash of a string is its length: `id1` and `id2` collide."""
    strong, seeds = hash_strings, [seed_of("rows", attempt) for attempt in attempts]

    def weak(column: Any, seed: int) -> np.ndarray:
        if seed not in seeds:
            return strong(column, seed)
        return np.array([len(value or "") for value in column.to_pylist()], np.uint64)

    monkeypatch.setattr("clipray.inputs.row_index.hash_strings", weak)


def test_ids_that_collide_are_hashed_with_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.parquet", {"image_id": ["id1", "id2", "id1", None], "uri": list("abcd")}, group=1)
    _weak_for([0], monkeypatch)
    _, found = scanned(path)
    assert found.index.seed == seed_of("rows", 1)
    assert len(found.keys) == 2
    assert found.rejects["reason"].to_pylist() == ["duplicate_id", "null_id"]
    assert {file: rows.tolist() for file, rows in found.rejected.items()} == {0: [2, 3]}


def test_ids_that_always_collide_end_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.parquet", some([1, 2]))
    _weak_for(range(8), monkeypatch)
    with pytest.raises(ManifestError, match="collide under every seed"):
        scanned(path)


def test_true_duplicates_are_no_collision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.parquet", {"image_id": ["a", "bb", "a", "bb"], "uri": list("wxyz")}, group=1)
    _weak_for([0], monkeypatch)
    _, found = scanned(path)
    assert found.index.seed == seed_of("rows", 0)
    assert found.keys.tolist() == [1, 2]


def test_row_groups_with(tmp_path: Path) -> None:
    opened, found = scanned(write(tmp_path / "m.parquet", some(range(10)), group=3))

    def groups(*ids: str) -> list[int]:
        wanted, _ = KeyIndex.of(hash_strings(pa.array(ids, pa.string()), found.index.seed), found.index.seed)
        return [row_group.number for row_group in row_groups_with(opened, found, wanted)]

    assert groups("id0") == [0]
    assert groups("id9", "id4", "id3") == [1, 3]
    assert groups("no such id") == []
    assert groups() == []
    assert groups(*(f"id{n}" for n in range(10))) == [0, 1, 2, 3]


def test_a_row_group_of_refused_rows_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", {"image_id": ["a", "b", "a", None, "c", "c"], "uri": list("012345")}, group=2)
    opened, found = scanned(path)
    assert [row_group.number for row_group in row_groups_with(opened, found, found.index)] == [0, 2]


def test_a_damaged_row_group_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", some(range(2_000)))
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + os.urandom(2_000) + whole[2_004:])
    with pytest.raises(ManifestError, match=r"m.parquet: row group 0 cannot be read"):
        scanned(path)
