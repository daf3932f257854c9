"""A run that the version of commit 84c8b63 has finished, under tests/data: no table of it is to be made again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import ROOT

import clipray
from clipray import tables
from clipray.storage.folder import Folder
from clipray.tables.digests import files_digest


@pytest.fixture
def job(tmp_path: Path) -> str:
    """The job file of a copy of the run."""
    home = tmp_path / "before"
    shutil.copytree(ROOT / "tests/data/run-84c8b63", home)
    job = yaml.safe_load((home / "job.yaml").read_text(encoding="utf-8"))
    job["output"] = str(home / "run")
    for step in job["steps"]:
        for settings in step.values():
            if "manifest" in settings:
                settings["manifest"] = str(home / settings["manifest"])
    (home / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return str(home / "job.yaml")


def states(job: str) -> dict[str, str]:
    return {report.name: f"{report.state} {report.note}" for report in clipray.plan(job)[0]}


def test_its_tables_stay_finished(job: str) -> None:
    assert len(states(job)) == 10
    assert set(states(job).values()) == {"finished nothing to do"}


def test_its_records_know_no_hashes(job: str) -> None:
    run = Folder(str(Path(job).parent / "run"))
    records = [record for name in run.folders() if (record := tables.read_record(run.sub(name))) is not None]
    assert len(records) == 16
    assert not any("sha256" in file for record in records for file in record.files)


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
