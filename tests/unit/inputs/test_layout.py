"""Parquet whose columns are not called as those of a manifest: read by name, by struct, by folder, with ids that are made."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipray.errors import ManifestError
from clipray.inputs.layout import Layout
from clipray.inputs.manifest import Manifest, open_manifest, read_rows
from clipray.inputs.row_index import scan
from clipray.inputs.usual_columns import usual_columns
from clipray.job import ManifestColumns
from clipray.job.row_spec import IMAGES, PAIRS, TEXTS, RowSpec
from clipray.steps.base.comparison import Comparison

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def opened(path: str | Path, keep: tuple[str, ...] = (), spec: RowSpec = IMAGES, **columns: Any) -> Manifest:
    source = ManifestColumns.model_validate({"path": str(path), **columns}) if columns else str(path)
    return open_manifest(source, keep, (), spec)


def rows(manifest: Manifest, keep: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        row
        for row_group in manifest.row_groups
        for read in read_rows(row_group, manifest.columns(keep), 2, manifest.layout, manifest.schema)
        for row in read.table.to_pylist()
    ]


def ids(manifest: Manifest) -> list[Any]:
    return [row[manifest.spec.key] for row in rows(manifest)]


def test_columns_are_read_by_the_names_that_the_job_gives_them(tmp_path: Path) -> None:
    meta = pa.array([{"size": {"w": n}} for n in range(3)])
    path = write(
        tmp_path / "a.parquet", {"key": ["x", "y", "z"], "URL": ["/1", "/2", "/3"], "uri": [0, 0, 0], "m": meta}
    )
    manifest = opened(path, ("width", "key"), image_id="key", uri="URL", width="m.size.w")
    assert rows(manifest, ("width", "key"))[1] == {"image_id": "y", "uri": "/2", "width": 1, "key": "y"}
    assert scan(manifest, ("width",)).rows == 3


def test_a_literal_name_goes_before_a_nested_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"i": ["a"], "m.u": ["/literal"], "m": pa.array([{"u": "/nested"}])})
    assert rows(opened(path, image_id="i", uri="m.u")) == [{"image_id": "a", "uri": "/literal"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image_id": "key", "uri": "URLL"},
            "`manifest` reads 'uri' from 'URLL': no column 'URLL'.*did you mean 'URL'",
        ),
        ({"image_id": "key", "uri": "m.sise"}, "no field 'sise', found: size; did you mean 'size'"),
        ({"image_id": "key", "uri": "URL.x"}, "'URL' is string; expected a struct with a field 'x'"),
        ({"image_id": "key", "uri": "m.size"}, "column `uri` is int64; expected string"),
        ({"image_id": "key", "bytes": "URL"}, "column `bytes` is string; expected binary"),
        ({"image_id": "m", "uri": "URL"}, "column `image_id` is struct.*expected strings, whole numbers or UUIDs"),
        (
            {"image_id": "key", "uri": "URL", "offset": "URL", "size": "m.size"},
            "'URL' is string; expected whole numbers in both",
        ),
        ({"image_id": "key", "uri": "URL", "offset": "m.size"}, "names `offset`, but 'size' is not there"),
        ({"image_id": "key", "uri": {"from": "row"}}, "manifest: uri: only ids are made `from` something"),
    ],
)
def test_what_is_wrong_in_the_names_is_one_line(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.parquet", {"key": ["x"], "URL": ["/1"], "m": pa.array([{"size": 1}])})
    with pytest.raises(ManifestError, match=message) as error:
        opened(path, **columns)
    assert "\n" not in str(error.value)


def test_texts_and_pairs_are_read_by_name_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"n": [7, 8], "TEXT": ["a", "b"], "picture": [1, 2]})
    assert rows(opened(path, spec=TEXTS, text_id="n", text="TEXT")) == [
        {"text_id": "7", "text": "a"}, {"text_id": "8", "text": "b"},
    ]  # fmt: skip
    of_images = opened(path, ("image_id",), TEXTS, text_id="n", text="TEXT", image_id="picture")
    assert [row["image_id"] for row in rows(of_images, ("image_id",))] == ["1", "2"]
    pairs = rows(opened(path, spec=PAIRS, image_id="picture", caption="TEXT"))
    assert [(row["image_id"], row["caption"]) for row in pairs] == [("1", "a"), ("2", "b")]
    with pytest.raises(ManifestError, match="`from: content` needs rows with bytes, which texts have not"):
        opened(path, spec=TEXTS, text_id={"from": "content"}, text="TEXT")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([7, -8], pa.int64()), ["7", "-8"]),
        (pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
        (pa.array([uuid.UUID(int=n).bytes for n in (1, 2)], pa.uuid()), [str(uuid.UUID(int=n)) for n in (1, 2)]),
        (pa.array([uuid.UUID(int=n).bytes for n in (1, 2)], pa.binary(16)), [str(uuid.UUID(int=n)) for n in (1, 2)]),
        (pa.array(["a", "ä"], pa.large_string()), ["a", "ä"]),
        (pa.array(["a", "ä"], pa.string_view()), ["a", "ä"]),
        (pa.array(["a", "ä"]).dictionary_encode(), ["a", "ä"]),
        (pa.array([7, 8]).dictionary_encode(), ["7", "8"]),
    ],
)
def test_ids_of_any_type_become_strings(tmp_path: Path, column: pa.Array, expected: list[str]) -> None:
    manifest = opened(write(tmp_path / "a.parquet", {"image_id": column, "uri": ["/1", "/2"]}))
    assert ids(manifest) == expected
    index = scan(manifest)
    assert (index.rows, index.rejects.num_rows) == (2, 0)


def test_fractions_are_no_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image_id": [1.5], "uri": ["/1"]})
    with pytest.raises(ManifestError, match="column `image_id` is double; expected strings, whole numbers or UUIDs"):
        opened(path)


def test_images_of_hugging_face_are_recognised(tmp_path: Path) -> None:
    """Bytes where they are there, else the path; ids of the file and the row, whatever other rows there are."""
    values = [{"bytes": b"1", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}, None, {"bytes": b"4", "path": None}]
    columns = {"image": pa.array(values, IMAGE), "label": [0, 1, 2, 3]}
    path = write(tmp_path / "data" / "train-0.parquet", columns, row_group_size=2)
    manifest = opened(path, ("label",))
    assert rows(manifest, ("label",)) == [
        {"image_id": "train-0/0", "uri": None, "bytes": b"1", "label": 0},
        {"image_id": "train-0/1", "uri": f"{tmp_path}/data/2.jpg", "bytes": None, "label": 1},
        {"image_id": "train-0/2", "uri": None, "bytes": None, "label": 2},
        {"image_id": "train-0/3", "uri": None, "bytes": b"4", "label": 3},
    ]
    assert ids(opened(tmp_path / "data")) == [f"train-0/{n}" for n in range(4)]
    assert ids(opened(tmp_path)) == [f"data/train-0/{n}" for n in range(4)]
    named = rows(opened(path, image_id="image.path", bytes="image.bytes"))
    assert [row["image_id"] for row in named] == ["1.jpg", "2.jpg", None, None]


def test_paths_of_images_cost_no_bytes_where_the_footer_says_that_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([{"bytes": b"1", "path": "1.jpg"}] * 3, IMAGE)})
    manifest = opened(path)
    monkeypatch.setattr("clipray.inputs.layout.RowGroup.stream", lambda *_: pytest.fail("nothing needs to be read"))
    assert scan(manifest).rows == 3


def test_ids_that_the_files_have_go_before_those_that_are_made(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"1", "path": "1.jpg"}], IMAGE)
    assert ids(opened(write(tmp_path / "a.parquet", {"image": image, "image_id": [5]}))) == ["5"]


def test_of_several_columns_of_images_one_must_be_named(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"1", "path": "1.jpg"}], IMAGE)
    path = write(tmp_path / "a.parquet", {"left": image, "right": pa.array([{"bytes": b"2", "path": "2"}], IMAGE)})
    with pytest.raises(ManifestError, match=r"2 columns hold images: left, right; name one: .*bytes: left\.bytes"):
        opened(path)
    assert rows(opened(path, bytes="right.bytes")) == [{"image_id": "a/0", "uri": None, "bytes": b"2"}]


def test_ids_of_rows_do_not_change_when_files_come(tmp_path: Path) -> None:
    made = {"image_id": {"from": "row"}}
    write(tmp_path / "m" / "b.parquet", {"uri": ["/1", "/2", "/3"]}, row_group_size=2)
    before = ids(opened(tmp_path / "m", **made))
    assert before == ["b/0", "b/1", "b/2"]
    write(tmp_path / "m" / "a.parquet", {"uri": ["/0"]})
    assert ids(opened(f"{tmp_path}/m/*.parquet", **made)) == ["a/0", *before]
    other = write(tmp_path / "n" / "b.parquet", {"uri": ["/9"]})
    source = ManifestColumns.model_validate({"path": [f"{tmp_path}/m/b.parquet", other], **made})
    with pytest.raises(
        ManifestError, match="would give their rows the same ids: name a folder or glob that holds both"
    ):
        open_manifest(source)


def test_ids_of_contents(tmp_path: Path) -> None:
    """Of equal contents the first row is kept; the others are no fault of the manifest."""
    path = write(tmp_path / "a.parquet", {"data": [b"1", b"2", b"1", None]})
    manifest = opened(path, bytes="data", image_id={"from": "content"})
    digests = [hashlib.sha256(data).hexdigest() for data in (b"1", b"2", b"1")]
    assert ids(manifest) == [*digests, None]
    index = scan(manifest)
    assert index.rejects["reason"].to_pylist() == ["duplicate_id", "null_id"]
    assert manifest.layout.excused >= {"duplicate_id"}
    assert "duplicate_id" not in opened(path, bytes="data", image_id={"from": "row"}).layout.excused


def test_folders_named_by_keys_are_columns(tmp_path: Path) -> None:
    for split, year in (("train", "2023"), ("a%2Fb", "__HIVE_DEFAULT_PARTITION__")):
        folder = tmp_path / f"split={split}" / f"year={year}"
        write(folder / "x.parquet", {"image_id": [split], "uri": ["/1"]})
    manifest = opened(tmp_path, ("split", "year"))
    assert rows(manifest, ("split", "year")) == [
        {"image_id": "a%2Fb", "uri": "/1", "split": "a/b", "year": None},
        {"image_id": "train", "uri": "/1", "split": "train", "year": "2023"},
    ]
    assert rows(opened(tmp_path, ("of",), of="split"), ("of",))[1]["of"] == "train"


def test_parts_of_files_are_addresses_of_their_own(tmp_path: Path) -> None:
    columns = {"image_id": ["a", "b"], "uri": ["p.tar", "s3://b/p.tar"], "offset": [512, None], "size": [100, None]}
    manifest = opened(write(tmp_path / "a.parquet", columns))
    assert [row["uri"] for row in rows(manifest)] == [f"{tmp_path}/p.tar#bytes=512-611", "s3://b/p.tar"]
    named = {"id": ["a"], "m": [{"at": 7}], "n": [3], "u": ["/p"], "offset": ["x"], "size": ["y"]}
    path = write(tmp_path / "b.parquet", named)
    assert rows(opened(path, image_id="id", uri="u")) == [{"image_id": "a", "uri": "/p"}]
    assert rows(opened(path, image_id="id", uri="u", offset="m.at", size="n"))[0]["uri"] == "/p#bytes=7-9"


def test_rows_that_img2dataset_could_not_download_are_no_fault(tmp_path: Path) -> None:
    columns = {
        "key": ["0", "1", "2"], "jpg": [b"1", None, b"3"], "url": ["http://a/0", "http://a/1", "http://a/2"],
        "status": ["success", "failed_to_download", None], "error_message": [None, "HTTP Error 404: Not Found", None],
    }  # fmt: skip
    path = write(tmp_path / "00000.parquet", columns)
    names = usual_columns(path)
    assert names == {"bytes": "jpg", "image_id": "key", "status": "status", "error_message": "error_message"}
    manifest = opened(path, **names)
    index = scan(manifest)
    assert index.rejects["reason"].to_pylist() == ["not_downloaded"] * 2
    assert "row 1 of" in index.rejects["message"][0].as_py()
    assert index.rejects["message"][0].as_py().endswith("failed_to_download: HTTP Error 404: Not Found")
    assert "not_downloaded" in manifest.layout.excused


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image_id": ["a"], "uri": ["/1"], "URL": ["/2"]}, {}),
        ({"URL": ["http://a/1"], "TEXT": ["t"]}, {"uri": "URL", "image_id": {"from": "row"}}),
        ({"id": [1], "file_name": ["1.jpg"]}, {"uri": "file_name", "image_id": "id"}),
        ({"image": [b"1"]}, {"bytes": "image", "image_id": {"from": "row"}}),
        ({"img": [{"bytes": b"1", "path": "p"}]}, {"bytes": "img.bytes", "image_id": {"from": "row"}}),
        ({"id": [0.5], "url": ["/1"]}, {"uri": "url", "image_id": {"from": "row"}}),
    ],
)
def test_usual_names_are_recognised(tmp_path: Path, columns: dict[str, Any], expected: dict[str, Any]) -> None:
    path = write(tmp_path / "a.parquet", columns)
    assert usual_columns(path) == expected
    manifest = opened(path, **expected)
    assert scan(manifest).rejects.num_rows == 0


def test_names_that_are_said_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"id": [1], "url": ["/1"], "big": ["/2"], "n": ["x"]})
    assert usual_columns(path, uri="big", image_id="n") == {"uri": "big", "image_id": "n"}
    with pytest.raises(ManifestError, match="no column 'bg'"):
        usual_columns(path, uri="bg")
    other = write(tmp_path / "b.parquet", {"x": [1]})
    with pytest.raises(
        ManifestError, match="no column says where the images are, found: x; name it with `--uri COLUMN`"
    ):
        usual_columns(other)


def test_a_layout_comes_back_from_the_facts_that_a_table_notes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([{"bytes": b"1", "path": "1.jpg"}], IMAGE)})
    layout = opened(path).layout
    assert Layout.of_facts(layout.facts) == layout
    assert Layout().facts == {}


def test_a_version_of_the_file_behind_a_uri_is_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image_id": ["a", "b"], "uri": ["/1", "/2"], "etag": ["x", None]})
    manifest = opened(path, version="etag")
    contents = Comparison(manifest, scan(manifest), None, frozenset(), ()).contents
    assert contents
    assert [contents.hashes(pa.Table.from_pylist([row])).to_pylist() for row in rows(manifest)] == [["x"], [None]]
    plain = opened(path)
    assert Comparison(plain, scan(plain), None, frozenset(), ()).contents is None
