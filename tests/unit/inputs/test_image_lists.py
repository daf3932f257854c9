import io
import json
import os
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray.errors import JobError, ManifestError
from clipray.inputs.image_lists import ListOptions
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.manifest import has_boxes, open_manifest, read_rows


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for name in ("hens/a.jpg", "hens/b.jpg", "ducks/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def made(source: Path | str, out: Path, **options: str) -> list[dict]:
    make_manifest(source, out, options=ListOptions(**options))
    manifest = open_manifest(str(out))
    reads = [read.table for row_group in manifest.row_groups for read in read_rows(row_group, ["image_id", "uri"], 100)]
    uris = pa.concat_tables(reads)["uri"].to_pylist()
    rows = pq.read_table(out).to_pylist()
    return [row | {"uri": uri} for row, uri in zip(rows, uris, strict=True)]


TABLES = {
    "list.csv": "file_name,year,code\nhens/a.jpg,2001,007\nducks/c.png,,12\n",
    "bom.csv": "\ufefffile_name,year,code\nhens/a.jpg,2001,007\nducks/c.png,,12\n",
    "semicolons.csv": "file_name;year;code\nhens/a.jpg;2001;007\nducks/c.png;;12\n",
    "list.tsv": "file_name\tyear\tcode\nhens/a.jpg\t2001\t007\nducks/c.png\t\t12\n",
    "list.jsonl": '{"file_name": "hens/a.jpg", "year": 2001, "code": "007"}\n{"file_name": "ducks/c.png", "code": "12"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(shelf: Path, name: str) -> None:
    (shelf / name).write_text(TABLES[name])
    assert made(shelf / name, shelf / "out/m.parquet") == [
        {"image_id": "hens/a.jpg", "uri": f"{shelf}/hens/a.jpg", "year": 2001, "code": "007"},
        {"image_id": "ducks/c.png", "uri": f"{shelf}/ducks/c.png", "year": None, "code": "12"},
    ]


def test_columns_by_name_and_addresses_as_they_are(shelf: Path) -> None:
    (shelf / "l.jsonl").write_text(
        '{"number": 7, "where": "https://x.org/a.jpg?w=1", "tags": ["a"]}\n{"number": 8, "where": "/p/b.jpg", "tags": []}\n'
    )
    assert made(shelf / "l.jsonl", shelf / "m.parquet", uri="where", image_id="number") == [
        {"image_id": "7", "uri": "https://x.org/a.jpg?w=1", "tags": ["a"]},
        {"image_id": "8", "uri": "/p/b.jpg", "tags": []},
    ]


def test_images_elsewhere(shelf: Path) -> None:
    (shelf / "l.csv").write_text("URL,id\n./a.jpg,1\n../ducks/c.png,2\n")
    rows = made(shelf / "l.csv", shelf / "m.parquet", images=str(shelf / "hens"))
    assert [row["uri"] for row in rows] == [f"{shelf}/hens/a.jpg", f"{shelf}/ducks/c.png"]
    assert [row["image_id"] for row in rows] == ["1", "2"]


def test_uris_stay_relative_under_the_manifest(shelf: Path) -> None:
    (shelf / "l.csv").write_text("path\nhens/a.jpg\n")
    make_manifest(shelf / "l.csv", shelf / "m.parquet")
    assert pq.read_table(shelf / "m.parquet")["uri"].to_pylist() == ["hens/a.jpg"]


PATHS = "hens/a.jpg\n./ducks/c.png\n\nhens/.DS_Store\nhens/Thumbs.db\n.hidden/b.jpg\nhttps://x.org/i?n=3\n"


def test_paths(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shelf / "l.txt").write_text(PATHS)
    notes: list[str] = []
    assert make_manifest(shelf / "l.txt", shelf / "m.parquet", say=notes.append) == 3
    assert notes == ["3 files left out: 1 without a suffix, 1 .db, 1 .jpg"]
    assert pq.read_table(shelf / "m.parquet")["image_id"].to_pylist() == [
        "hens/a.jpg",
        "ducks/c.png",
        "https://x.org/i?n=3",
    ]
    monkeypatch.chdir(shelf)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(PATHS.encode())))
    assert made("-", shelf / "n.parquet")[1] == {"image_id": "ducks/c.png", "uri": f"{shelf}/ducks/c.png"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata_of_an_image_folder(shelf: Path, name: str) -> None:
    rows = pl.DataFrame({"file_name": ["a.jpg", "lost.jpg"], "text": ["a hen", "none"], "n": [1, 2]})
    if name.endswith("csv"):
        rows.write_csv(shelf / "hens" / name)
    elif name.endswith("jsonl"):
        rows.write_ndjson(shelf / "hens" / name)
    else:
        rows.write_parquet(shelf / "hens" / name)
    (shelf / "ducks/metadata.jsonl").write_text('{"file_name": "c.png", "text": "a duck"}')
    notes: list[str] = []
    assert make_manifest(shelf, shelf / "m.parquet", label="folder", say=notes.append) == 3
    assert notes == ["images that the metadata names and that are not there: 1, hens/lost.jpg"]
    assert pq.read_table(shelf / "m.parquet").to_pylist() == [
        {"image_id": "ducks/c.png", "uri": "ducks/c.png", "text": "a duck", "n": None, "label": "ducks"},
        {"image_id": "hens/a.jpg", "uri": "hens/a.jpg", "text": "a hen", "n": 1, "label": "hens"},
        {"image_id": "hens/b.jpg", "uri": "hens/b.jpg", "text": None, "n": None, "label": "hens"},
    ]


COCO = {
    "images": [{"id": 9, "file_name": "a.jpg"}, {"id": 10, "file_name": "b.jpg"}],
    "categories": [{"id": 1, "name": "hen"}],
    "annotations": [
        {"id": 5, "image_id": 9, "bbox": [1, 2, 3.5, 4], "category_id": 1},
        {"id": 6, "image_id": 9, "bbox": [1, 2, 0, 4], "category_id": 1},
        {"id": 7, "image_id": 9, "caption": "two hens"},
        {"id": 8, "image_id": 99, "caption": "of no image"},
    ],
}


@pytest.mark.parametrize(
    "name", ["hens/coco.json", "annotations/instances_val2017.json", "instances_val2017.json", "other/c.json"]
)
def test_coco(shelf: Path, name: str) -> None:
    (shelf / name).parent.mkdir(exist_ok=True)
    (shelf / name).write_text(json.dumps(COCO))
    os.symlink(shelf / "hens", shelf / "val2017")
    options = {"images": str(shelf / "hens")} if name.startswith("other") else {}
    folder = shelf / ("val2017" if "val2017" in name else "hens")
    assert made(shelf / name, shelf / "out.parquet", **options) == [
        {
            "image_id": "9", "uri": f"{folder}/a.jpg", "captions": ["two hens"], "boxes": [[1, 2, 4.5, 6]],
            "box_ids": ["5"], "box_labels": ["hen"], "box_captions": ["hen"],
        },
        {"image_id": "10", "uri": f"{folder}/b.jpg", "captions": [], "boxes": [], "box_ids": [], "box_labels": [], "box_captions": []},
    ]  # fmt: skip
    assert has_boxes(open_manifest(str(shelf / "out.parquet"), keep=["boxes"]))


def test_coco_by_address(shelf: Path) -> None:
    (shelf / "c.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "z.jpg", "coco_url": "http://x.org/z.jpg"}]})
    )
    assert made(shelf / "c.json", shelf / "m.parquet") == [{"image_id": "1", "uri": "http://x.org/z.jpg"}]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("l.csv", "hens/a.jpg,hen\nhens/b.jpg,hen\n", {}, "expected a header line with the columns' names, found 'hens/a.jpg, hen'"),
        ("l.csv", "a,b\n1,2\n", {}, "no column says where the images are, found: a, b; name it with `--uri COLUMN`"),
        ("l.csv", "path,b\n1,2\n", {"uri": "paht"}, "no column 'paht', found: path, b; did you mean 'path'?"),
        ("l.csv", "path,b\n1,2\n", {"image_id": "z"}, "no column 'z', found: path, b"),
        ("l.csv", "", {}, "expected UTF-8 with a header line; "),
        ("l.csv", "path\n\udce9.jpg\n", {}, "expected UTF-8 with a header line; "),
        ("l.jsonl", '{"path": "a.jpg"}\nb.jpg\n', {}, "expected JSON, an object in each line; "),
        ("l.json", '{"path": "a.jpg"}', {}, "expected COCO's JSON, with `images` that have an `id` and a `file_name`"),
        ("l.json", '{"images": []}', {}, "expected COCO's JSON, with `images` that have an `id` and a `file_name`"),
        ("l.json", "[1", {}, "expected COCO's JSON: "),
        ("l.json", '{"images": [{"id": 1, "file_name": "z.jpg"}]}', {}, "name their folder with `--images FOLDER`"),
        ("l.txt", "notes.md\n\n", {}, "expected an image's path or URL in each line, found none in 1 lines"),
        ("l.csv", "path,n\n", {}, "expected a row for each image, found none"),
        ("l.jsonl", '{"image": {"path": "a.jpg"}}', {}, "column 'image' holds Struct({'path': String}), expected a string or a number"),
        ("l.json", '{"images": [{"id": 1, "file_name": "hens/a.jpg"}], "annotations": {"a": 1}}', {}, "expected `annotations` to be a list"),
        ("l.json", '{"images": [{"id": 1, "file_name": "hens/a.jpg"}], "annotations": [{"image_id": 1, "bbox": 5}]}', {}, "`bbox` of four numbers"),
        ("l.json", '{"images": [{"id": 1, "file_name": "y", "coco_url": "u"}, {"id": 2, "file_name": "z"}]}', {}, "`--images FOLDER`"),
        ("metadata.jsonl", '{"file_name": ["a.jpg"]}', {}, "column 'file_name' holds List(String), expected a string or a number"),
        ("metadata.csv", "name,x\na.jpg,1\n", {}, "no column 'file_name', found: name, x; "),
    ],
)  # fmt: skip
def test_what_is_no_list(shelf: Path, name: str, content: str, options: dict[str, str], message: str) -> None:
    (shelf / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    source = shelf if name.startswith("metadata") else shelf / name
    with pytest.raises(ManifestError) as error:
        make_manifest(source, shelf / "m.parquet", options=ListOptions(**options))
    line = str(error.value)
    assert message in line
    assert str(shelf / name) in line
    assert "\n" not in line
    assert not (shelf / "m.parquet").exists()


def test_metadata_of_types_that_differ(shelf: Path) -> None:
    (shelf / "hens/metadata.jsonl").write_text('{"file_name": "a.jpg", "n": 1}')
    (shelf / "ducks/metadata.jsonl").write_text('{"file_name": "c.png", "n": [1]}')
    with pytest.raises(ManifestError, match=r"columns of its metadata files have types that differ: .*i64"):
        make_manifest(shelf, shelf / "m.parquet")


def test_ids_stay_as_they_stand_in_a_csv(shelf: Path) -> None:
    (shelf / "l.csv").write_text("path,ID,price\n1.50,1e5,1.50\n2,+7,2\n")
    rows = made(shelf / "l.csv", shelf / "m.parquet")
    assert [(row["image_id"], Path(row["uri"]).name, row["price"]) for row in rows] == [
        ("1e5", "1.50", 1.5),
        ("+7", "2", 2),
    ]
    assert [row["image_id"] for row in made(shelf / "l.csv", shelf / "n.parquet", image_id="price")] == ["1.50", "2"]


def test_a_path_that_is_not_utf8(shelf: Path) -> None:
    (shelf / "l.txt").write_bytes(b"hens/caf\xe9.jpg\nhens/a.jpg\n")
    rows = made(shelf / "l.txt", shelf / "m.parquet")
    assert [row["image_id"] for row in rows] == ["hens/caf\\xe9.jpg", "hens/a.jpg"]
    assert rows[0]["uri"] == f"file://{shelf}/hens/caf%E9.jpg"


def test_no_such_list(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        make_manifest(tmp_path / "l.csv", tmp_path / "m.parquet")


def test_a_label_that_the_list_has(shelf: Path) -> None:
    (shelf / "l.csv").write_text("path,label\nhens/a.jpg,hen\n")
    with pytest.raises(JobError, match="has a column `label` already"):
        make_manifest(shelf / "l.csv", shelf / "m.parquet", label="folder")


def test_a_list_on_object_storage(s3: str, shelf: Path) -> None:
    (shelf / "l.csv").write_text("path\nhens/a.jpg\nhttp://x.org/b.jpg\n")
    import fsspec

    fsspec.filesystem("s3").put_file(str(shelf / "l.csv"), f"{s3}/lists/l.csv")
    assert [row["uri"] for row in made(f"{s3}/lists/l.csv", shelf / "m.parquet")] == [
        f"{s3}/lists/hens/a.jpg", "http://x.org/b.jpg",
    ]  # fmt: skip
