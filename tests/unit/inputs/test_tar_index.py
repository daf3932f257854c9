"""Tars to rows: which tars are named, which members are images, and what of the index stays valid when tars change."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import Answer, ObjectStore, Website

from clipray.errors import ManifestError
from clipray.inputs.tar_index import Group, IndexFile, index_group, index_tars
from clipray.inputs.tar_listing import expand_braces, list_tars
from clipray.inputs.tar_samples import Wanted, read_samples
from clipray.storage.folder import Folder


def tar_of(members: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def write_tar(path: Path, members: dict[str, bytes] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(members or {"0.jpg": path.name.encode(), "0.txt": b"t", "1.jpg": b"11", "1.txt": b"tt"}))


# --- which tars


def test_braces() -> None:
    assert expand_braces("s3://b/{08..11}.tar") == [f"s3://b/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{a,b}/x-{9..10}.tar") == ["a/x-9.tar", "a/x-10.tar", "b/x-9.tar", "b/x-10.tar"]
    for wrong in ("{a}.tar", "{}.tar"):
        with pytest.raises(ManifestError, match="expected braces such as"):
            expand_braces(wrong)


def test_a_tar_is_named_by_its_path_in_what_was_asked_for(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", ".hidden/2.tar", "a/._0.tar"):
        write_tar(tmp_path / name)
    (tmp_path / "a" / "0.parquet").write_bytes(b"x")
    home = str(tmp_path)

    def names(*sources: str) -> list[str]:
        return [tar.name for tar in list_tars(sources)]

    assert names(home) == names(f"{home}/**/*.tar") == names(f"{home}/{{a,b}}/*.tar") == ["a/0", "a/1", "b/0"]
    assert names(f"{home}/a/{{0..1}}.tar") == names(f"{home}/a") == names(f"{home}/a/*.tar") == ["0", "1"]
    assert names(f"{home}/a/0.tar") == names(f"file://{home}/a/0.tar") == ["0"]
    assert names(f"{home}/a/1.tar", f"{home}/a/*.tar") == ["0", "1"]
    (tar,) = list_tars(f"{home}/a/0.tar")
    assert (tar.url, tar.size) == (f"{home}/a/0.tar", os.path.getsize(tar.url))
    assert tar.version == f"{tar.size} {os.stat(tar.url).st_mtime_ns}"


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "a/0.tar")
    write_tar(tmp_path / "b/0.tar")
    write_tar(tmp_path / "c/0.tar.gz")
    (tmp_path / "d.tar").mkdir()
    wrong = {
        f"{tmp_path}/a/*.tarx": f"{tmp_path}/a/*.tarx: no tars there: expected a .tar, a glob, braces",
        f"{tmp_path}/a/{{0..2}}.tar": f"{tmp_path}/a/1.tar: no such tar, and 1 more are not there",
        f"{tmp_path}/x.tar": f"{tmp_path}/x.tar: no such tar",
        f"{tmp_path}/c": f"{tmp_path}/c/0.tar.gz: a compressed tar, in which no image can be read alone",
        f"{tmp_path}/c/0.tar.gz": f"{tmp_path}/c/0.tar.gz: a compressed tar",
        f"{tmp_path}/d.tar": f"{tmp_path}/d.tar: no tars there",
    }
    for source, message in wrong.items():
        with pytest.raises(ManifestError) as raised:
            list_tars(source)
        assert str(raised.value).startswith(message)
        assert "\n" not in str(raised.value)
    with pytest.raises(ManifestError, match="would give their samples the same ids: name a folder or glob"):
        list_tars([f"{tmp_path}/a", f"{tmp_path}/b"])


# --- which samples


def rows_of(tmp_path: Path, members: dict[str, bytes], wanted: Wanted | None = None) -> list[dict[str, object]]:
    write_tar(tmp_path / "t.tar", members)
    (tar,) = list_tars(str(tmp_path / "t.tar"))
    data = (tmp_path / "t.tar").read_bytes()
    rows = read_samples(tar, wanted or Wanted()).table.to_pylist()
    assert {(row.pop("uri"), row.pop("version")) for row in rows} <= {(tar.url, tar.version)}
    return [{**row, "data": data[row.pop("offset") :][: row.pop("size")]} for row in rows]


def test_an_image_is_named_by_its_path_up_to_the_first_dot(tmp_path: Path) -> None:
    members = {
        "./0.JPG": b"a", "d/e.f/1.png": b"b", "/2.webp": b"c", "3.txt": b"no", "jpg": b"no", "._4.jpg": b"no",
        ".d/5.jpg": b"no", "__MACOSX/6.jpg": b"no", "d/.7.jpg": b"no", "ü/8.seg.png": b"d", "9.jpg": b"",
    }  # fmt: skip
    rows = {row["image_id"]: row["data"] for row in rows_of(tmp_path, members)}
    assert rows == {"t/0": b"a", "t/d/e.f/1": b"b", "t/2": b"c", "t/ü/8": b"d", "t/9": b""}


def test_members_beside_an_image_are_columns_on_request(tmp_path: Path) -> None:
    members = {
        "0.json": b'{"a": 1}', "0.jpg": b"0", "0.txt": b"zero", "1.txt": b"alone", "2.txt": b"caf\xe9", "2.jpg": b"2",
        "3.jpg": b"3", "3.cls": b"7",
    }  # fmt: skip
    rows = rows_of(tmp_path, members, Wanted(columns=("txt", "json", "cls")))
    assert [[row[name] for name in ("image_id", "txt", "json", "cls")] for row in rows] == [
        ["t/0", "zero", '{"a": 1}', None],
        ["t/2", "caf\\xe9", None, None],
        ["t/3", None, None, "7"],
    ]


def test_of_several_images_the_job_chooses_one(tmp_path: Path) -> None:
    members = {"0.jpg": b"0", "0.seg.png": b"s", "1.jpg": b"1", "2.seg.png": b"s"}
    with pytest.raises(ManifestError) as raised:
        rows_of(tmp_path, members)
    assert str(raised.value) == (
        f"{tmp_path}/t.tar: sample '0' has 2 images, jpg, seg.png: choose one, such as `image: jpg`"
    )
    assert [row["data"] for row in rows_of(tmp_path, members, Wanted("jpg"))] == [b"0", b"1"]
    assert [row["data"] for row in rows_of(tmp_path, members, Wanted("seg.png"))] == [b"s", b"s"]


# --- the index


def indexed(home: Path, wanted: Wanted | None = None) -> tuple[list[str], list[str]]:
    """The files of the index, and the tars whose headers were read for it."""
    read: list[str] = []

    def index(groups: Sequence[Group]) -> list[IndexFile]:
        read.extend(tar.name for group in groups for tar in group.tars)
        return [index_group(group) for group in groups]

    tars = list_tars(str(home / "tars"))
    return index_tars(tars, wanted or Wanted(), Folder(str(home / "index")), index, tidy=True), read


def ids(urls: list[str]) -> list[str]:
    return pa.concat_tables(pq.read_table(url, columns=["image_id"]) for url in urls)["image_id"].to_pylist()


def test_only_tars_that_changed_or_are_new_are_read_again(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"tars/{number:02d}.tar")
    urls, read = indexed(tmp_path)
    everything = [f"{number:02d}/{key}" for number in range(40) for key in (0, 1)]
    assert (len(urls), len(read), ids(urls)) == (8, 40, everything)
    assert indexed(tmp_path) == (urls, [])
    assert len(indexed(tmp_path, Wanted("jpg"))[1]) == 40

    write_tar(tmp_path / "tars/40.tar")
    more, read = indexed(tmp_path)
    assert (read, len(more), set(urls) < set(more)) == (["40"], 9, True)

    os.utime(tmp_path / "tars/07.tar", ns=(1, 1))
    changed, read = indexed(tmp_path)
    assert read == [f"{number:02d}" for number in range(5, 10)]  # that share its file
    assert len(set(more) - set(changed)) == 1
    assert ids(changed) == [*everything, "40/0", "40/1"]
    assert not (set(more) - set(changed)) & {str(path) for path in (tmp_path / "index").iterdir()}

    (tmp_path / "tars/20.tar").unlink()
    Path(changed[0]).write_bytes(b"torn")
    left, read = indexed(tmp_path)
    assert ids(left) == [name for name in [*everything, "40/0", "40/1"] if not name.startswith("20/")]
    assert read == ["00", "01", "02", "03", "04", "21", "22", "23", "24"]
    assert indexed(tmp_path) == (left, [])


def test_no_images_and_no_such_members_are_one_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0.tar", {"0.json": b"{}", "0.txt": b"x", "1.txt": b"y"})
    with pytest.raises(ManifestError) as raised:
        indexed(tmp_path)
    assert str(raised.value) == f"{tmp_path}/tars/0.tar: no images in this tar, found: .txt, .json"
    write_tar(tmp_path / "tars/1.tar")
    with pytest.raises(ManifestError, match=r"no member \.caption in these 2 tars, found: \.txt"):
        indexed(tmp_path, Wanted(columns=("caption",)))
    assert ids(indexed(tmp_path, Wanted(columns=("txt",)))[0]) == ["1/0", "1/1"]


def test_over_http_a_server_must_send_parts() -> None:
    site = Website()
    try:
        data = tar_of({f"{n}.jpg": bytes(1_000) for n in range(300)})
        site.answers |= {f"/a/{n}.tar": [Answer(data, in_parts=True)] for n in range(2)}
        site.answers["/whole.tar"] = [Answer(data)]
        tars = list_tars(f"{site.url}/a/{{0..1}}.tar")
        assert [tar.name for tar in tars] == ["0", "1"]
        assert len(read_samples(tars[1], Wanted()).table) == 300
        with pytest.raises(ManifestError, match="the server sends whole files only"):
            read_samples(list_tars(f"{site.url}/whole.tar")[0], Wanted())
        with pytest.raises(ManifestError, match=r"/a/2.tar: no such tar$"):
            list_tars(f"{site.url}/a/{{0..2}}.tar")
    finally:
        site.stop()


def test_on_object_storage_small_members_are_read_through(object_store: ObjectStore, s3: str) -> None:
    fs = fsspec.filesystem("s3")
    data = tar_of({f"{n:04d}.jpg": bytes(50_000) for n in range(400)})  # 20 MB
    fs.pipe({f"{s3}/indexed/{n:02d}.tar": data for n in range(6)})
    tars = list_tars(f"{s3}/indexed/{{00..05}}.tar")
    assert [(tar.name, tar.size) for tar in tars] == [(f"{n:02d}", len(data)) for n in range(6)]
    before = len(object_store.requests)
    table = read_samples(tars[3], Wanted()).table
    assert len(object_store.requests) - before <= 4
    assert table["image_id"].to_pylist() == [f"03/{n:04d}" for n in range(400)]
    fs.pipe_file(f"{s3}/indexed/02.tar", data[:50_000] + b"x" + data[50_001:])
    again = list_tars(f"{s3}/indexed/*.tar")
    assert [tar.version != old.version for tar, old in zip(again, tars, strict=True)] == [n == 2 for n in range(6)]
