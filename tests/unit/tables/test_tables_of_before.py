"""Runs that versions before have finished, under tests/data: no table of them is to be made again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support import ROOT

import clipray
from clipray import tables
from clipray.steps.base import encode_step
from clipray.storage.folder import Folder, versions_by_url
from clipray.tables.digests import files_digest

WITHOUT_HASHES, WITH_HASHES = "84c8b63", "34d5816"  # commits; of the files of a table, in its record


@pytest.fixture(params=[WITHOUT_HASHES, WITH_HASHES])
def before(request: pytest.FixtureRequest) -> str:
    """The version that made the run."""
    return str(request.param)


@pytest.fixture
def job(before: str, tmp_path: Path) -> str:
    """The job file of a copy of the run."""
    home = tmp_path / "before"
    shutil.copytree(ROOT / f"tests/data/run-{before}", home)
    job = yaml.safe_load((home / "job.yaml").read_text(encoding="utf-8"))
    job["output"] = str(home / "run")
    for step in job["steps"]:
        for settings in step.values():
            if "manifest" in settings:
                settings["manifest"] = str(home / settings["manifest"])
    (home / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    _moved(Folder(f"{home}/run/images"), str(home / "images.parquet"))
    return str(home / "job.yaml")


def _moved(table: Folder, manifest: str) -> None:
    """As if the table had been made from this copy of its manifest, where it says which file it was compared with."""
    record = tables.read_record(table)
    assert record is not None
    if "manifest_versions" in record.inputs:
        inputs = {**record.inputs, "manifest_versions": versions_by_url([manifest])}
        tables.write_record(table, replace(record, inputs=inputs))


def states(job: str) -> dict[str, str]:
    return {report.name: f"{report.state} {report.note}" for report in clipray.plan(job)[0]}


def test_its_tables_stay_finished(job: str) -> None:
    assert len(states(job)) == 10
    assert set(states(job).values()) == {"finished nothing to do"}


def test_its_records_know_hashes_or_not(job: str, before: str) -> None:
    run = Folder(str(Path(job).parent / "run"))
    records = [record for name in run.folders() if (record := tables.read_record(run.sub(name))) is not None]
    assert len(records) == 16
    assert {"sha256" in file for record in records for file in record.files} == {before == WITH_HASHES}


def commit_anew(folder: Folder) -> None:
    """As a run does that finds nothing to write: with the hash of each file."""
    record = tables.read_record(folder)
    assert record is not None
    files = [tables.verified(folder, file["name"]).entry() for file in record.files]
    assert all(len(file["sha256"]) == 64 for file in files)
    tables.write_record(folder, replace(record, files=files))


def test_they_stay_finished_when_what_they_rest_on_gets_hashes(job: str) -> None:
    """First the images alone, then every table."""
    run = Folder(str(Path(job).parent / "run"))
    for names in (["images"], [name for name in run.folders() if name != "rejects"]):
        for name in names:
            commit_anew(run.sub(name))
        assert set(states(job).values()) == {"finished nothing to do"}


def test_values_that_change_in_a_file_of_the_same_size_are_noticed(job: str) -> None:
    """Where the hash was known before: the size alone would not tell."""
    run = Folder(str(Path(job).parent / "run"))
    for name in ("images", "reduced"):
        commit_anew(run.sub(name))
    reduced = tables.read_record(run.sub("reduced"))
    assert reduced is not None
    table = run.sub("images")
    with_hashes = tables.read_record(table)
    assert with_hashes is not None
    by_content = files_digest(with_hashes.files).content
    tables.write_record(run.sub("reduced"), replace(reduced, inputs={**reduced.inputs, "digest": by_content}))
    assert states(job)["reduced"] == "finished nothing to do"
    other = [{**file, "sha256": file["sha256"][::-1]} for file in with_hashes.files]
    tables.write_record(table, replace(with_hashes, files=other))
    assert states(job)["reduced"] == "partial 12 rows to do"


# --- digests of the hash of versions before


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tables whose rows were counted again."""
    names: list[str] = []

    def check_committed(table: Folder, *rest: Any, **options: Any) -> Any:
        names.append(table.url.rpartition("/")[2])
        return plain(table, *rest, **options)

    plain = encode_step.check_committed
    monkeypatch.setattr(encode_step, "check_committed", check_committed)
    return names


def test_rows_are_counted_again_once_and_nothing_is_made_again(job: str, counted: list[str]) -> None:
    run = Path(job).parent / "run"
    files = {
        path: path.read_bytes() for path in run.rglob("*") if path.suffix == ".parquet" or path.name == "_table.json"
    }
    assert set(states(job).values()) == {"finished nothing to do"}
    assert set(counted) == {"images", "texts"}
    counted.clear()
    assert {report.note for report in clipray.run(job)} == {"was finished already"}
    assert set(counted) == {"images", "texts"}
    counted.clear()
    assert {report.note for report in clipray.run(job)} == {"was finished already"}
    assert set(states(job).values()) == {"finished nothing to do"}
    assert counted == []
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize("noted", [False, True])
def test_a_row_that_changes_is_noticed_before_and_after_the_recount(job: str, noted: bool) -> None:
    if noted:
        clipray.run(job)
    path = Path(job).parent / "texts.parquet"
    texts = pq.read_table(path)
    words = ["a new thing", *texts["text"].to_pylist()[1:]]
    pq.write_table(texts.set_column(texts.schema.get_field_index("text"), "text", pa.array(words)), path)
    assert states(job)["texts"] == "partial 1 rows to do"
    assert states(job)["images"] == "finished nothing to do"


def test_a_row_that_is_gone_is_noticed(job: str) -> None:
    path = Path(job).parent / "texts.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    assert states(job)["texts"] == "partial 0 rows to do"
