"""What the environment does to the command: one line, an exit code, and nothing hidden. Defects, closed pipes, terminals."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import clipray
from clipray import tables
from clipray.cli import main
from clipray.cli.app import out
from clipray.errors import ClipRayError, RunError, SchemaError, StorageError
from clipray.runner.printing import PlainConsole, PlainTable, harden_streams, shown
from clipray.runner.status import status
from clipray.storage.environment import environment_error, environment_errors
from clipray.storage.events import Events, read_events
from clipray.storage.folder import Folder, explained
from clipray.storage.seals import open_json, sealed_json
from clipray.tables.started import read_started


def called(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["clipray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def fails_with(error: BaseException) -> Any:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job whose output is yet to be named."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"image_id": ["a"], "uri": ["a.png"]}), "m.parquet")
    return tmp_path / "job.yaml"


def write(job: Path, output: str) -> str:
    steps = [{"embed_images": {"manifest": str(job.parent / "m.parquet")}}]
    job.write_text(yaml.safe_dump({"output": output, "model": {"name": "demo"}, "steps": steps}))
    return str(job)


@pytest.mark.parametrize("output", ["m.parquet", "m.parquet/below", "/proc/clipray", "x" * 300])
def test_an_output_that_cannot_be_made_is_one_line(
    output: str, job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(job, str(job.parent / output))
    assert called(["run", path], monkeypatch) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("clipray: ")
    assert output in line
    with pytest.raises(StorageError):
        clipray.run(path)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            RunError,
            "/x/y: No space left on device; free some",
        ),
        (PermissionError(errno.EACCES, "Permission denied", b"/x/\xff"), StorageError, r"/x/\xff: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), StorageError, "expected a place that can be written"),
        (OSError(errno.EMFILE, "Too many open files"), RunError, "ulimit -n"),
        (FileNotFoundError("bucket/key"), StorageError, "bucket/key"),
        (TimeoutError(), RunError, "TimeoutError"),
        (MemoryError(), RunError, "out of memory"),
        (SchemaError("ours"), SchemaError, "ours"),
    ],
)
def test_what_the_machine_does_is_told_as_such(error: Exception, kind: type[ClipRayError], words: str) -> None:
    known = environment_error(error)
    assert type(known) is kind
    assert words in str(known)
    assert "\n" not in str(known)
    with pytest.raises(kind), environment_errors():
        raise error


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), AssertionError(), TypeError("x")])
def test_what_the_program_may_be_guilty_of_stays_as_it_is(error: Exception) -> None:
    assert environment_error(error) is None
    with pytest.raises(type(error)) as caught, environment_errors():
        raise error
    assert caught.value is error


def test_an_error_of_a_storage_library_is_told() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    error = botocore.ClientError({"Error": {"Code": "SlowDown", "Message": "slow"}}, "GetObject")
    assert isinstance(environment_error(error), StorageError)


def test_a_defect_is_one_line_with_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("clipray.runner.status.status", fails_with(KeyError("a\nsecond line")))
    assert called(["status", "x"], monkeypatch) == 70
    printed, err = capfd.readouterr()
    (line,) = err.splitlines()
    (log,) = tmp_path.glob("clipray-*.log")
    assert printed == ""
    assert "this is a defect in clipray" in line
    assert str(log) in line
    text = log.read_text()
    assert "Traceback" in text
    assert "KeyError" in text


def test_a_defect_is_told_also_where_no_log_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("clipray.cli.tempfile.mkstemp", fails_with(OSError(errno.ENOSPC, "full")))
    monkeypatch.setattr("clipray.runner.status.status", fails_with(KeyError("x")))
    assert called(["status", "x"], monkeypatch) == 70
    (line,) = capfd.readouterr().err.splitlines()
    assert "at test_exits.py:" in line


def test_ctrl_c_is_a_word_and_its_code(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("clipray.runner.status.status", fails_with(KeyboardInterrupt()))
    assert called(["status", "x"], monkeypatch) == 130
    assert capfd.readouterr().err == "stopped\n"


def test_a_closed_pipe_is_quiet(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(out, "quiet", False)  # and again afterwards
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        for verb in (["schema"], ["schema", "images", "--json"]):
            assert called(verb, monkeypatch) == 141
    out.print("forget what nobody read")
    assert capfd.readouterr().err == ""


def test_a_full_disk_behind_the_output_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert called(["schema", "images", "--json"], monkeypatch) == 1
    assert "No space left on device" in capfd.readouterr().err


def test_a_mistake_on_the_command_line_shows_no_escapes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert called(["status", "x", "--\x1b[31m"], monkeypatch) == 2
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert r"\x1b[31m" in err


def test_what_is_printed_is_text_as_it_is() -> None:
    sink = io.StringIO()
    console = PlainConsole(file=sink, width=200)
    table = PlainTable("id", title="a\x1b[0m [b]")
    table.add_row("[red]x\x1b]0;title\x07[/red] :smile: \u202eabc")
    console.print("[/nothing] :smile: \x1b[2J\ttwo\nlines", "é")
    console.print(table)
    text = sink.getvalue()
    assert text.startswith("[/nothing] :smile: \\x1b[2J")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"[red]x\x1b]0;title\x07[/red] :smile: \u202eabc" in text
    assert r"a\x1b[0m [b]" in text
    assert shown("line\nby\tline é 漢") == "line\nby\tline é 漢"


def test_a_terminal_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    harden_streams()
    PlainConsole().print("é 漢 \udcff")
    sys.stdout.flush()
    assert raw.getvalue() == b"\xe9 \\u6f22 \\udcff\n"


def test_an_event_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    events = Events(Folder(str(tmp_path)), said.append)
    events.begin("run_started")
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    events.write("progress", rows=1)
    events.write("run_failed")
    (line,) = said
    assert "No space left on device" in line
    with pytest.raises(OSError, match="No space left"):
        events.begin("run_started")


def test_lines_of_the_log_that_are_no_events_are_skipped(tmp_path: Path) -> None:
    good = json.dumps({"time": "2026-01-01T00:00:00Z", "event": "progress", "step": "images", "total": 9, "rate": 1.5})
    odd = [b"[1]", b"7", b"null", b"\xff\xfe", b'{"event": 3, "time": "x"}', b'{"event": "progress"}', b"[" * 100_000]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([*odd, good.encode(), b'{"torn']))
    assert read_events(Folder(str(tmp_path))) == [json.loads(good)]


@pytest.mark.parametrize("total", ['"many"', "null", "[]", "true"])
def test_a_run_whose_log_is_odd_has_a_status(total: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "_started.json").write_text('{"settings": {}}')
    odd = f'{{"time": "yesterday", "event": "progress", "step": "images", "total": {total}, "rate": "fast"}}\n'
    fine = '{"time": "yesterday", "event": "progress", "step": "images", "total": 5, "rate": 1}\n'
    (tmp_path / "events.jsonl").write_text(odd)
    assert status(tmp_path)[0].total is None
    (tmp_path / "events.jsonl").write_text(fine + odd)
    (report,) = status(tmp_path)
    assert (report.total, report.note) == (5, "started")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "many"},
        {"rows": True},
        {"files": {}},
        {"files": [3]},
        {"files": [{"name": "a"}]},
        {"files": [{"name": "a", "rows": None, "bytes": 1}]},
        {"inputs": []},
        {"columns": "x"},
        {"seconds": None},
    ],
    ids=str,
)
def test_a_record_of_wrong_types_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "images"))
    schema = tables.arrow_schema("rejects")
    tables.commit(folder, "rejects", schema, [], fingerprint="f", inputs={}, settings={}, provenance={}, seconds=1)
    assert tables.read_record(folder) is not None
    record, _ = open_json(folder.read(tables.RECORD) or b"")
    folder.write(tables.RECORD, sealed_json({**record, **change}))
    with pytest.raises(SchemaError, match=f"not as clipray writes it: {next(iter(change))}"):
        tables.read_record(folder)


@pytest.mark.parametrize(
    "text", ["", "[1]", "7", "\udcff", '{"settings": []}', '{"attempt": "x"}', '{"fingerprint": 1}', "[" * 100_000]
)
def test_a_broken_note_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "_started.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_started(Folder(str(tmp_path))) is None
    (tmp_path / "_started.json").write_text('{"settings": {}, "attempt": 1, "more": null}')
    assert read_started(Folder(str(tmp_path))) == {"settings": {}, "attempt": 1, "more": None}


def test_a_torn_remote_file_is_not_taken_for_storage_that_fails() -> None:
    with pytest.raises(OSError, match="corrupt") as caught, explained("s3://bucket/x"):
        raise OSError("corrupt page")
    assert type(caught.value) is OSError
    with pytest.raises(StorageError, match="s3://bucket/x: access denied"), explained("s3://bucket/x"):
        raise PermissionError("Access Denied")
