"""Headers of tars in every format are read as Python's own tarfile reads them, and what is none is one line."""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipray.errors import ManifestError
from clipray.inputs.tar_members import (
    HEADER_BYTES,
    NEAR_BYTES,
    PIECE_BYTES,
    Member,
    _RemoteBytes,
    open_tar,
    read_members,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def members(path: Path) -> list[Member]:
    with open_tar(str(path), path.stat().st_size) as tar:
        return list(read_members(tar))


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ManifestError) as raised:
        members(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    return str(raised.value).removeprefix(f"{path}: ")


def add(tar: tarfile.TarFile, name: str, size: int = 5, **facts: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    for fact, value in facts.items():
        setattr(info, fact, value)
    tar.addfile(info, io.BytesIO(bytes(size)) if info.isreg() else None)


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_of_tarfile(form: str, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[form], pax_headers={"comment": "of all"}) as tar:
        for number in range(200):
            add(
                tar, f"{'d' * rng.integers(0, 90)}/{'n' * rng.integers(1, 90)}{number}.jpg", int(rng.integers(0, 2_000))
            )
        add(tar, "folder", 0, type=tarfile.DIRTYPE)
        add(tar, "link.jpg", 0, type=tarfile.SYMTYPE, linkname="x" * 90)
        add(tar, "hard.jpg", 0, type=tarfile.LNKTYPE, linkname="d/n0.jpg")
        add(tar, "pipe", 0, type=tarfile.FIFOTYPE)
        if form != "ustar":
            add(tar, f"{'long' * 500}/ü €.jpg")
            add(tar, "behind.jpg", 0, type=tarfile.SYMTYPE, linkname="y" * 300)
        add(tar, "last.jpg", 512)
    with tarfile.open(path) as tar:
        expected = [Member(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert members(path) == expected
    assert len(expected) >= 201


def test_sizes_beyond_the_digits_of_a_header(tmp_path: Path) -> None:
    size = 9 * 2**30
    for form in ("gnu", "pax"):
        info = tarfile.TarInfo("large.bin")
        info.size = size
        with open(tmp_path / "a.tar", "wb") as file:
            file.write(info.tobuf(FORMATS[form]))
            offset = file.tell()
            file.seek(size, 1)
            file.write(tarfile.TarInfo("b.jpg").tobuf(FORMATS[form]) + bytes(1_024))
        assert members(tmp_path / "a.tar") == [
            Member("large.bin", offset, size),
            Member("b.jpg", offset + size + 512, 0),
        ]


def test_tars_of_old_and_odd_writers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("caf\udce9.jpg")
    plain = bytearray(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
    assert plain[257:263] == b"ustar\0"
    plain[257:265] = bytes(8)  # as before ustar
    plain[148:156] = b"%06o\0 " % (sum(plain[:148]) + 256 + sum(plain[156:]) - 256)  # of signed bytes
    path.write_bytes(bytes(plain))  # and no end
    assert members(path) == [Member("caf\\xe9.jpg", 512, 0)]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "short.jpg", 3, pax_headers={"size": "3", "path": "renamed.jpg"})
    path.write_bytes(path.read_bytes() + b"rubbish behind the end")
    assert members(path) == [Member("renamed.jpg", 1_536, 3)]
    path.write_bytes(bytes(10_240))
    assert members(path) == []


def test_what_is_no_plain_tar_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for n in range(3):
            add(tar, f"{n}.jpg", 1_000)
    good = path.read_bytes()
    assert "compressed with gzip, in which no image can be read alone" in refusal(path, gzip.compress(good))
    assert "compressed with bzip2" in refusal(path, bz2.compress(good))
    assert refusal(path, b"<html>" * 200) == "no tar: it starts with b'<html><h'"
    assert refusal(path, b"short") == "no tar: it starts with b'short'"
    assert refusal(path, b"") == "no tar: 0 bytes"
    assert refusal(path, good[:1_000]) == "truncated: a member at byte 512 has 1000 bytes, the tar 1000"
    assert refusal(path, good[:1_530]) == "truncated: expected a member at byte 1536, the tar has 1530"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.jpg", 10, pax_headers={"path": "b.jpg"})
    assert refusal(path, path.read_bytes()[:1_024]) == "truncated: expected a member at byte 1024, the tar has 1024"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.jpg", 10, pax_headers={"size": "-9999"})
    assert refusal(path, path.read_bytes()) == "damaged: a member at byte 1536 has -1 bytes"
    assert refusal(path, good[:1_600]) == "truncated: expected the header of a member at byte 1536 of 1600"
    assert refusal(path, good[:1_536] + b"x" + good[1_537:]) == (
        f"damaged: expected the header of a member at byte 1536 of {len(good)}"
    )


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "holes.img", 0, type=tarfile.GNUTYPE_SPARSE)
    assert refusal(path, path.read_bytes()) == "member 'holes.img' is sparse: write the tar without --sparse"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "holes.img", 5, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    assert "is sparse" in refusal(path, path.read_bytes())


class Counted(_RemoteBytes):
    """Reads a local file as if it lay on a server."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), path.stat().st_size)
        self.requests: list[int] = []

    def _fetch(self, offset: int, size: int) -> bytes:
        self.requests.append(min(size, self.size - offset))
        with open(self.url, "rb") as file:
            file.seek(offset)
            return file.read(size)


@pytest.mark.parametrize(
    ("sizes", "through"), [([3_000], True), ([100_000, 40], True), ([5 * NEAR_BYTES, 40, 300], False)]
)
def test_on_a_server_what_is_near_is_read_through_and_what_is_far_is_asked_for(
    sizes: list[int], through: bool, tmp_path: Path
) -> None:
    path, count = tmp_path / "a.tar", 100
    with open(path, "wb") as file:
        for number in range(count):
            for kind, size in enumerate(sizes):
                info = tarfile.TarInfo(f"{number}.{kind}")
                info.size = size
                file.write(info.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // 512) * 512, 1)
        file.write(bytes(1_024))
    remote = Counted(path)
    assert list(read_members(remote)) == members(path)
    if through:
        assert len(remote.requests) <= 2 + path.stat().st_size // PIECE_BYTES
        assert sum(remote.requests) <= path.stat().st_size
    else:
        assert count <= len(remote.requests) <= count + 2
        assert max(remote.requests) == HEADER_BYTES
