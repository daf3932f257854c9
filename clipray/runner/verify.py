"""`clipray verify`: reads every byte of a run's tables and indexes and compares it with what was written.

Damage is noted in the table's folder, so that the next run repairs it. Nothing else is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from clipray import tables
from clipray.errors import ClipRayError, DamagedError, JobError, SchemaError
from clipray.inputs.index_reader import broken_files, hashes
from clipray.storage.folder import Folder, absolute
from clipray.tables.started import STARTED, read_started


@dataclass(frozen=True)
class Broken:
    """A file that differs from what was written.

    Attributes:
        problem: `missing`, `size`, `content`, `not in the record`, or what reading it said.
        rows: rows of the file, where the record says so.
        repair: what the next run does about it.
    """

    file: str
    problem: str
    rows: int | None
    repair: str


@dataclass
class TableCheck:
    """A table of the run.

    Attributes:
        state: `whole`, `broken`, or `unfinished`: whole so far.
        files, rows: as its record has them, or as they lie there.
        without_hash: files of a version before, which recorded no hashes: only their pages were read.
        note: why what is broken could not be noted for the next run; "" where it could.
    """

    name: str
    state: str = "whole"
    files: int = 0
    rows: int = 0
    broken: list[Broken] = field(default_factory=list)
    without_hash: list[str] = field(default_factory=list)
    note: str = ""


def verify(url: str | os.PathLike[str]) -> list[TableCheck]:
    """Read every byte of a run's tables and indexes, and note what is broken for the next run.

    Raises:
        JobError: there is no run.
    """
    output = Folder(absolute(os.fspath(url)))
    checks = [check for name in _names(output) if (check := check_table(output.sub(name), name)) is not None]
    if not checks:
        raise JobError(f"{url}: no run there: expected the `output` folder of a job that was started")
    return checks


def _names(output: Folder) -> Iterator[str]:
    for name in output.folders():
        if name == tables.REJECTS:
            yield from (f"{tables.REJECTS}/{table}" for table in output.sub(name).folders())
        else:
            yield name


def check_table(folder: Folder, name: str) -> TableCheck | None:
    """Verify one table. Returns None if clipray did not write the folder."""
    sizes, check = folder.sizes(), TableCheck(name)
    record, damaged = None, False
    try:
        record = tables.read_record(folder)
    except DamagedError as error:
        damaged = True
        check.broken.append(Broken(tables.RECORD, str(error.__cause__ or error), None, "the table is committed anew"))
    if record is not None:
        _check_files(folder, record, sizes, check)
    elif damaged or STARTED in sizes or _has_own(folder):
        _check_shards(folder, check)
    else:
        return None
    if STARTED in sizes and read_started(folder) is None:
        check.broken.append(Broken(STARTED, "content", None, "the table is committed anew"))
    if check.broken:
        check.state = "broken"
        _note(folder, check)
    return check


def _has_own(folder: Folder) -> bool:
    for name in tables.shard_names(folder):
        try:
            if "fingerprint" in tables.shard_footer(folder, name)[2]:
                return True
        except (SchemaError, FileNotFoundError):
            continue
    return False


def _check_shards(folder: Folder, check: TableCheck) -> None:
    """Check the shards of a table without a record by the checksum that each carries."""
    whole, broken = tables.verify_shards(folder, tables.shard_names(folder))
    check.state, check.files, check.rows = "unfinished", len(whole), sum(shard.rows for shard in whole.values())
    check.broken += [Broken(name, str(error), None, "its rows are made again") for name, error in broken.items()]


def _check_files(folder: Folder, record: tables.Record, sizes: dict[str, int], check: TableCheck) -> None:
    check.files, check.rows = len(record.files), record.rows
    repair = _repair(record)
    names = {file["name"] for file in record.files}
    whole, _ = tables.verify_shards(folder, sorted(names & sizes.keys()))
    for file in record.files:
        name = file["name"]
        if "sha256" not in file:
            check.without_hash.append(name)
        problem = _problem(folder, file, sizes.get(name), whole.get(name))
        if problem:
            check.broken.append(Broken(name, problem, file["rows"], repair))
    check.broken += [
        Broken(name, "not in the record", None, "a run removes a shard of its own, and refuses one that is not")
        for name in tables.shard_names(folder)
        if name not in names
    ]
    if record.table == "index":
        broken = broken_files(folder, record)
        check.broken += [Broken(name, problem, record.rows, repair) for name, problem in broken.items()]
        check.without_hash += sorted(record.provenance["sizes"].keys() - hashes(record).keys())


def _problem(folder: Folder, file: dict[str, object], size: int | None, shard: tables.Shard | None) -> str:
    """What is wrong with a file of a record; "" if nothing is."""
    if size is None:
        return "missing"
    if size != file["bytes"]:
        return "size"
    if shard is None or ("sha256" in file and file["sha256"] != shard.sha256):
        return "content"
    if "sha256" not in file:
        try:
            tables.read_shard(folder, shard.name)
        except (SchemaError, FileNotFoundError) as error:
            return str(error)
    return ""


def _repair(record: tables.Record) -> str:
    """What the next run does about a shard of a table."""
    special = {
        "rejects": "these rows are tried again",
        "regions": "the images of these rows are encoded again",
        "clusters": "the table is made anew",
        "index": "the index is built anew",
        "metrics": "the step measures again",
    }
    if record.table in special:
        return special[record.table]
    return "these rows are encoded again" if "manifest" in record.inputs else "this part is made again"


def _note(folder: Folder, check: TableCheck) -> None:
    try:
        tables.note_damaged(folder, [broken.file for broken in check.broken])
    except ClipRayError as error:
        check.note = str(error)
