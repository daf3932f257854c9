"""A run that the version of commit 84c8b63 has finished, under tests/data: no table of it is to be made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from support import ROOT

from clipray import runner, tables
from clipray.storage import Folder


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
    return {report.name: f"{report.state} {report.note}" for report in runner.plan(job)[0]}


def test_its_tables_stay_finished(job: str) -> None:
    assert len(states(job)) == 10
    assert set(states(job).values()) == {"finished nothing to do"}


def test_its_records_know_no_hashes(job: str) -> None:
    run = Folder(str(Path(job).parent / "run"))
    records = [record for name in run.folders() if (record := tables.read_record(run.sub(name))) is not None]
    assert len(records) == 16
    assert not any("sha256" in file for record in records for file in record.files)
