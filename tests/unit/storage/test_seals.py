"""Checksums that files carry of themselves: whatever bit flips, the file is told from a whole one."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipray import tables
from clipray.errors import DamagedError, SchemaError
from clipray.storage import seals
from clipray.storage.folder import Folder
from clipray.tables.started import STARTED, read_started, write_started

STAMP = {"fingerprint": "0123456789abcdef", "note": "ü"}


def write(folder: Folder, rows: int = 40, name: str = "part-0.parquet") -> tables.Shard:
    schema = tables.arrow_schema("images", {"clip": 4})
    columns = {
        "image_id": [f"{n}.jpg" for n in range(rows)],
        "uri": [f"/photos/{n}.jpg" for n in range(rows)],
        "height": pa.array([480] * rows, pa.int32()),
        "width": pa.array([640] * rows, pa.int32()),
        "clip": tables.vector_array(
            np.random.default_rng(0).normal(size=(rows, 4)), schema.field("clip").type
        ),
    }  # fmt: skip
    return tables.write_shard(folder, name, "images", pa.table(columns, schema=schema), STAMP)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def legacy(shard: Path) -> None:
    """Turn a shard into what a version without seals wrote: no mark in the footer, no word of a seal in the stamp."""
    import pyarrow.parquet as pq

    data = pq.read_table(shard)
    stamp = json.loads(data.schema.metadata[b"clipray"])
    del stamp["sealed"]
    pq.write_table(data.replace_schema_metadata({"clipray": json.dumps(stamp)}), shard)


def test_the_hash_of_a_shard_is_that_of_its_file(tmp_path: Path) -> None:
    shard = write(Folder(str(tmp_path)))
    data = (tmp_path / shard.name).read_bytes()
    assert (shard.sha256, shard.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
    assert tables.verified(Folder(str(tmp_path)), shard.name) == shard


def test_the_seal_is_the_hash_of_the_file_with_zeros_in_its_place(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    shard = write(Folder(str(tmp_path)))
    seal = pq.read_metadata(tmp_path / shard.name).metadata[seals.KEY.encode()]
    data = (tmp_path / shard.name).read_bytes()
    assert data.count(seal) == 1
    assert hashlib.sha256(data.replace(seal, b"0" * 64)).hexdigest().encode() == seal


def test_a_file_larger_than_what_is_read_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shard = write(Folder(str(tmp_path)), 1_000)
    monkeypatch.setattr(seals, "CHUNK_BYTES", 997)
    assert tables.verified(Folder(str(tmp_path)), shard.name) == shard
    (tmp_path / shard.name).write_bytes(flipped((tmp_path / shard.name).read_bytes(), 8 * 5_000))
    with pytest.raises(DamagedError, match="has changed since it was written"):
        tables.verified(Folder(str(tmp_path)), shard.name)


def test_every_byte_of_a_shard_is_watched(tmp_path: Path) -> None:
    data = (tmp_path / write(Folder(str(tmp_path))).name).read_bytes()
    unsealed = 0
    for byte in range(len(data)):
        changed = flipped(data, 8 * byte + byte % 8)
        whole = seals.file_hashes(io.BytesIO(changed))[1]
        assert not whole
        if whole is None:  # the seal cannot be found, but the stamp says that there was one
            unsealed += 1
            (tmp_path / "part-0.parquet").write_bytes(changed)
            with pytest.raises(SchemaError):
                tables.verified(Folder(str(tmp_path)), "part-0.parquet")
    assert unsealed >= len(seals.KEY)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_cut_shard_is_not_whole(tmp_path: Path, keep: int) -> None:
    shard = write(Folder(str(tmp_path)))
    (tmp_path / shard.name).write_bytes((tmp_path / shard.name).read_bytes()[:keep])
    with pytest.raises(SchemaError, match="not a whole Parquet file"):
        tables.verified(Folder(str(tmp_path)), shard.name)


def test_a_damaged_footer_is_told_in_one_line(tmp_path: Path) -> None:
    """Whatever the flipped bit makes of it: names that are no text, a stamp that is no JSON, sizes beyond the file."""
    folder = Folder(str(tmp_path))
    data = (tmp_path / write(folder).name).read_bytes()
    told = set()
    for bit in range(8 * len(data) - 24_000, 8 * len(data), 61):
        (tmp_path / "part-0.parquet").write_bytes(flipped(data, bit))
        with contextlib.suppress(SchemaError):
            tables.read_shard(folder, "part-0.parquet")
            tables.shard_footer(folder, "part-0.parquet")
            continue
        told.add(bit)
    assert len(told) > 40


def test_a_shard_of_a_version_before_is_taken_and_gets_its_hash(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    name = write(folder).name
    legacy(tmp_path / name)
    assert tables.verified(folder, name).sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_whole_shards_leave_out_what_is_damaged_or_gone(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    names = [write(folder, name=f"part-{n}.parquet").name for n in range(3)]
    (tmp_path / names[1]).write_bytes(flipped((tmp_path / names[1]).read_bytes(), 999))
    whole, broken = tables.verify_shards(folder, [*names, "part-9.parquet"])
    assert (list(whole), list(broken)) == ([names[0], names[2]], [names[1]])


def test_shards_on_s3(s3: str) -> None:
    folder = Folder(f"{s3}/seals")
    shard = write(folder)
    assert tables.verified(folder, shard.name) == shard
    folder.write(shard.name, flipped(folder.read(shard.name) or b"", 8 * 300))
    assert tables.verify_shards(folder, [shard.name])[0] == {}


VALUES: dict[str, Any] = {"files": [{"name": "a.parquet", "sha256": "00ff" * 16}], "note": "ü", "empty": {}}


def opens(data: bytes) -> bool:
    try:
        seals.open_json(data)
    except ValueError:
        return False
    return True


def test_json_comes_back() -> None:
    assert seals.open_json(seals.sealed_json(VALUES)) == (VALUES, True)
    assert seals.open_json(json.dumps(VALUES).encode()) == (VALUES, False)


def test_json_is_plain_for_others() -> None:
    value = json.loads(seals.sealed_json(VALUES))
    assert {name: value[name] for name in VALUES} == VALUES


def test_every_bit_of_json_is_watched() -> None:
    data = seals.sealed_json(VALUES)
    for bit in range(8 * len(data)):
        assert not opens(flipped(data, bit)), bit


@pytest.mark.parametrize("data", [b"", b"[]", b"7", b"{", b"\xff", b'{"checksum": ""}'])
def test_what_is_no_json_object(data: bytes) -> None:
    assert not opens(data)


def record(folder: Folder, files: list[tables.Shard]) -> tables.Record:
    return tables.commit(
        folder, "images", tables.arrow_schema("images", {"clip": 4}), files,
        fingerprint=STAMP["fingerprint"], inputs={}, settings={}, provenance={},
    )  # fmt: skip


@pytest.mark.parametrize("rows", [[], [40]], ids=["without files", "with a file"])
def test_every_byte_of_a_record_is_watched(tmp_path: Path, rows: list[int]) -> None:
    folder = Folder(str(tmp_path))
    made = record(folder, [write(folder, n) for n in rows])
    assert tables.read_record(folder) == made
    data = folder.read(tables.RECORD) or b""
    for byte in range(len(data)):
        (tmp_path / tables.RECORD).write_bytes(flipped(data, 8 * byte + byte % 8))
        with pytest.raises(DamagedError, match=r"_table\.json is damaged"):
            tables.read_record(folder)
        assert tables.record_to_go_on(folder) is None


def test_a_record_of_a_version_before_has_no_checksum(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    made = record(folder, [tables.Shard("part-0.parquet", 40, 1_000)])
    values = json.loads(folder.read(tables.RECORD) or b"")
    del values["sealed"], values["checksum"]
    folder.write(tables.RECORD, json.dumps(values).encode())
    assert tables.read_record(folder) == made
    assert made.files == [{"name": "part-0.parquet", "rows": 40, "bytes": 1_000}]


def test_a_damaged_note_of_the_begin_says_nothing(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    write_started(folder, {"settings": {"step": "embed_images"}, "attempt": 3})
    assert read_started(folder) == {"settings": {"step": "embed_images"}, "attempt": 3}
    data = folder.read(STARTED) or b""
    for bit in range(0, 8 * len(data), 3):
        (tmp_path / STARTED).write_bytes(flipped(data, bit))
        assert read_started(folder) is None


def test_sealing_is_in_place() -> None:
    """The seal's place is found though the words of the mark stand in the data too."""
    import pyarrow.parquet as pq

    data = pa.table({"text": [(seals._MARK + seals.BLANK.encode()).decode("latin-1")] * 3})
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, data.schema, compression="none") as writer:
        writer.write_table(data)
        writer.add_key_value_metadata({seals.KEY: seals.BLANK})
    sha256 = seals.seal(sink)
    assert seals.file_hashes(io.BytesIO(sink.getvalue())) == (sha256, True)
    assert pq.read_table(io.BytesIO(sink.getvalue())).equals(data)
