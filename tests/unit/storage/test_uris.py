"""What a path or URI names, and that everything that opens one takes it the same way."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import AS_IT_IS

from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.manifest import open_manifest, read_rows, resolve
from clipray.inputs.parquet_files import expand_parquet
from clipray.pipelines.decode import DecodedImage, load_image
from clipray.pipelines.spec import Limits
from clipray.report.thumbnails import ImageSource, Thumbnails
from clipray.storage.folder import Folder, absolute, filesystem
from clipray.storage.uris import is_chain, is_local, is_relative, parse, split_byte_range, with_byte_range
from clipray.tables.reasons import Rejected

NAMES = ["a b.jpg", "ü.jpg", "h#1.jpg", "q?.jpg", "a::b.jpg", "100%.jpg", "[1]*.jpg", "a%20b.jpg", "c:d.jpg"]

PARTS = {
    "a/b": ("file", "a/b"),
    "/a::b/c": ("file", "/a::b/c"),
    "/a/b://c": ("file", "/a/b://c"),
    "a::b": ("file", "a::b"),
    "file:///my%20photos/a.jpg": ("file", "/my photos/a.jpg"),
    "file:/a.jpg": ("file", "/a.jpg"),
    "file://localhost/a.jpg": ("file", "/a.jpg"),
    "FILE://LocalHost/a.jpg": ("file", "/a.jpg"),
    "file://here/a.jpg": ("file", "here/a.jpg"),
    "file:///a::b/c://d": ("file", "/a::b/c://d"),
    "file:///100%.jpg": ("file", "/100%.jpg"),
    "file:///%zz%41": ("file", "/%zzA"),
    "file:a.jpg": ("file", "file:a.jpg"),
    "S3://Bucket/Key::a": ("s3", "Bucket/Key::a"),
    "https://host/a%20b?c#d": ("https", "host/a%20b?c#d"),
    "zip://a::file://b": ("zip", "zip://a::file://b"),
    "simplecache::s3://b/c": ("simplecache", "simplecache::s3://b/c"),
}


@pytest.mark.parametrize("uri", PARTS)
def test_the_parts_of_a_uri(uri: str) -> None:
    assert parse(uri) == PARTS[uri]


def test_a_part_of_a_file_has_an_address() -> None:
    for uri in ("/a/b.tar", "b.tar", "s3://b/c.tar", "file:///a%20b.tar", "https://h/x?y#z"):
        address = with_byte_range(uri, 1536, 10)
        assert address == f"{uri}#bytes=1536-1545"
        assert split_byte_range(address) == (uri, (1536, 1545))
        assert split_byte_range(uri) == (uri, None)
        assert (is_local(address), is_relative(address)) == (is_local(uri), is_relative(uri))
    for offset in (0, 512):
        part = split_byte_range(with_byte_range("a", offset, 0))[1]
        assert part
        assert part.size == 0
    assert resolve("b.tar#bytes=0-9", "/m/x.parquet") == "/m/b.tar#bytes=0-9"
    for uri in ("h#1.jpg", "a#bytes=1-", "a#bytes=1-2.jpg", "a#bytes=-1-2"):
        assert split_byte_range(uri) == (uri, None)


def test_chains_and_relative_paths_are_told_apart() -> None:
    chains = ("zip://a::file://b", "simplecache::s3://b/c", "file://a.jpg::file:///b", "zip://a.jpg::/b.zip")
    assert [uri for uri in (*PARTS, *chains) if is_chain(uri)] == [*list(PARTS)[-2:], *chains]
    assert [uri for uri in PARTS if is_relative(uri)] == ["a/b", "a::b", "file:a.jpg"]
    assert not any(is_local(uri) for uri in (*chains, "S3://b", "http://h"))


def test_a_file_uri_takes_the_name_as_it_lies_where_only_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "a%20b").write_bytes(b"")
    assert parse(f"file://{tmp_path}/a%20b")[1] == f"{tmp_path}/a%20b"
    (tmp_path / "a b").write_bytes(b"")
    assert parse(f"file://{tmp_path}/a%20b")[1] == f"{tmp_path}/a b"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos::1"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / name, "PNG")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_a_local_name_is_that_image(name: str, photos: Path) -> None:
    path = photos / name
    as_uri = path.as_uri()
    forms = [str(path), as_uri, as_uri.replace("file:", "FILE:"), as_uri.replace("file://", "file:")]
    forms += [as_uri.replace("file://", "file://localhost"), f"file://{path}"]
    expected = load_image(str(path), None, Limits(), AS_IT_IS)
    for form in forms[:-1] if name == "a%20b.jpg" else forms:  # written so, it is the escape of another that is there
        loaded = load_image(form, None, Limits(), AS_IT_IS)
        assert isinstance(loaded, DecodedImage), form
        assert np.array_equal(loaded.pixels, expected.pixels), form
        assert Thumbnails(8, 10_000).of_uri(ImageSource(name, form, (8, 8)))[1] == ""


def test_a_manifest_of_such_names_finds_them_all_from_anywhere(photos: Path, tmp_path: Path) -> None:
    for source in (str(photos), photos.as_uri(), photos.as_uri().replace("file", "FILE", 1)):
        for out in (photos / "m.parquet", tmp_path / "m.parquet"):
            assert make_manifest(source, out.as_uri()) == len(NAMES)
            manifest = open_manifest(out.as_uri())
            rows = [
                row
                for row_group in manifest.row_groups
                for rows in read_rows(row_group, ["uri"], 99)
                for row in rows.table.to_pylist()
            ]
            assert sorted(row["uri"] for row in rows) == sorted(str(photos / name) for name in NAMES)
    assert pq.read_table(photos / "m.parquet")["uri"].to_pylist() == sorted(NAMES)


def test_a_local_folder_with_colons_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("a::b", f"{tmp_path}/a::b", f"file://{tmp_path}/a::b", f"file:{tmp_path}/a%3A%3Ab"):
        folder = Folder(absolute(url))
        assert folder.local
        folder.write("x.json", json.dumps({"url": url}).encode())
        assert json.loads((tmp_path / "a::b" / "x.json").read_text()) == {"url": url}
        assert list(folder.sizes()) == ["x.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["a::b"]


def test_a_key_of_object_storage_with_colons_is_no_chain() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/box/a::b.parquet", b"x")
    assert filesystem("MEMORY://box/a::b.parquet") == (fs, "/box/a::b.parquet")
    assert expand_parquet("memory://box/a::b.parquet") == ["memory:///box/a::b.parquet"]


def test_what_is_not_relative_is_left_by_a_manifest() -> None:
    for uri in ("/a", "file:/a", "FILE:///a", "S3://b/c", "zip://a::file://b", None, ""):
        assert resolve(uri, "/m/m.parquet") == uri
    for uri in ("a b%20c", "a::b", "file:a"):
        assert resolve(uri, "/m/m.parquet") == f"/m/{uri}"


def test_a_scheme_that_is_not_allowed_is_refused_in_capitals_too() -> None:
    for uri in ("FILE:///a", "file:/a", "/a", "S3A://b/c"):
        refused = load_image(uri, None, Limits(schemes=("http",)), AS_IT_IS)
        assert isinstance(refused, Rejected)
        assert refused.reason == "scheme_not_allowed"
