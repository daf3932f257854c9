"""Folders and globs of images: what is one, what is skipped, and what is said of the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import AS_IT_IS

from clipray.errors import JobError, StorageError
from clipray.inputs.image_listing import left_out_sentence, list_images
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.manifest import open_manifest, read_rows
from clipray.inputs.parquet_files import expand_parquet
from clipray.pipelines.decode import DecodedImage, load_image
from clipray.pipelines.spec import Limits
from clipray.tables.reasons import Rejected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, and what file managers put among them."""
    home = tmp_path / "photos"
    for name in ("a.jpg", "deep/b.jfif"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(home / name, "JPEG")
    for name in (
        "._a.jpg",
        ".hidden.jpg",
        "deep/._b.jfif",
        ".thumbnails/1.jpg",
        "__MACOSX/a.jpg",
        "__MACOSX/deep/c.jpg",
        ".Trash-1000/files/x.jpg",
        "@eaDir/a.jpg/SYNOPHOTO.jpg",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(home / "a.jpg", home / name)
    return home


def names(source: Path | str) -> list[str]:
    listing = list_images(str(source))
    return [os.path.relpath(path, listing.root) for path in listing.paths]


def test_companions_and_thumbnails_are_no_images(folder: Path) -> None:
    assert names(folder) == ["a.jpg", "deep/b.jfif"]
    assert names(f"{folder}/**") == ["a.jpg", "deep/b.jfif"]
    assert names(f"{folder}/*.jpg") == ["a.jpg"]
    assert names(folder / ".thumbnails") == ["1.jpg"]  # what is named is taken
    assert names(f"{folder}/.thumbnails/*") == ["1.jpg"]
    assert names(f"{folder}/.*.jpg") == ["._a.jpg", ".hidden.jpg"]


@pytest.mark.parametrize("read", [list_images, expand_parquet])
def test_two_stars_within_a_name(folder: Path, read: Callable[[str], Any]) -> None:
    with pytest.raises(JobError, match=r"expected `\*\*/\*\.jpg` rather than"):
        read(f"{folder}/**.jpg")


def test_the_same_elsewhere(folder: Path) -> None:
    fs = fsspec.filesystem("memory")
    try:
        fs.put(str(folder), "/shelf", recursive=True)
        for source in ("memory://shelf", "memory://shelf/**"):
            assert [os.path.relpath(path, "/shelf") for path in list_images(source).paths] == ["a.jpg", "deep/b.jfif"]
    finally:
        fs.rm("/shelf", recursive=True)


def test_what_is_left_out_is_counted(folder: Path) -> None:
    for name in ("x.raw", "y.RAW", "notes.txt", "README", ".DS_Store"):
        (folder / name).touch()
    said: list[str] = []
    assert make_manifest(folder, folder.parent / "m.parquet", say=said.append) == 2
    assert said == ["4 files left out: 2 .raw, 1 without a suffix, 1 .txt"]
    for n in range(9):
        (folder / f"z.s{n}").touch()
    assert left_out_sentence(list_images(str(folder)).others) == (
        "13 files left out: 2 .raw, 1 without a suffix, 1 .s0, 1 .s1, 1 .s2, 7 others"
    )
    assert left_out_sentence(list_images(f"{folder}/*.jpg").others) == ""


def test_a_pipe_and_a_broken_link_are_rejected_rows(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    assert names(folder) == ["a.jpg", "deep/b.jfif", "gone.jpg", "pipe.jpg"]
    for name, reason in (("pipe.jpg", "not_a_file"), ("gone.jpg", "not_found")):
        row = load_image(str(folder / name), None, Limits(), AS_IT_IS)
        assert isinstance(row, Rejected)
        assert row.reason == reason


def test_links_to_folders_are_followed_once(folder: Path) -> None:
    other = folder.parent / "other"
    (other / "inner").mkdir(parents=True)
    shutil.copy(folder / "a.jpg", other / "inner/c.jpg")
    (folder / "again").symlink_to(folder / "deep")
    (folder / "link").symlink_to(other)
    (other / "inner/loop").symlink_to(folder)
    (folder / "deep/up").symlink_to("..")
    (folder / "e.jpg").symlink_to(other / "inner/c.jpg")
    expected = ["a.jpg", "deep/b.jfif", "e.jpg", "link/inner/c.jpg"]
    assert names(folder) == expected
    assert names(f"{folder}/**") == expected
    assert names(f"{folder}/*/inner/*.jpg") == ["link/inner/c.jpg"]


def test_names_that_are_not_utf8(folder: Path) -> None:
    shutil.copy(folder / "a.jpg", os.fsencode(folder) + b"/caf\xe9 100%.jpg")
    assert make_manifest(folder, folder / "m.parquet", label="folder") == 3
    rows = {row["image_id"]: row["uri"] for row in pq.read_table(folder / "m.parquet").to_pylist()}
    assert rows == {
        "a.jpg": "a.jpg",
        "deep/b.jfif": "deep/b.jfif",
        r"caf\xe9 100%.jpg": f"file://{folder}/caf%E9%20100%25.jpg",
    }
    for uri in rows_of(folder / "m.parquet"):
        assert isinstance(load_image(uri, None, Limits(), AS_IT_IS), DecodedImage)


def rows_of(manifest: Path) -> list[str]:
    opened = open_manifest(str(manifest))
    return [
        uri
        for row_group in opened.row_groups
        for rows in read_rows(row_group, ["uri"], 9)
        for uri in rows.table["uri"].to_pylist()
    ]


def test_a_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match="deep: this folder cannot be listed: Permission denied"):
        list_images(str(folder))
