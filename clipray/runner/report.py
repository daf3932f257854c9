"""`clipray report RUN`: the page of a run that exists already."""

from __future__ import annotations

import os
from typing import Any

from clipray.errors import JobError
from clipray.job import Job
from clipray.report.run_tables import finished_tables
from clipray.runner.run import run_job
from clipray.runner.status import status
from clipray.storage.environment import environment_errors
from clipray.storage.events import read_events
from clipray.storage.folder import Folder, absolute


@environment_errors()
def write_report(url: str | os.PathLike[str], *, title: str | None = None, **options: Any) -> str:
    """Make a page of all finished tables of the run at `url`, as a step `report` at the end of its job does.

    Args:
        title: by default the name of the job that ran there last.
        options: `watch` and `notice`, as of `run`.

    Returns:
        The page's path or URL.

    Raises:
        ClipRayError: there is no run, or one of its tables is not whole.
    """
    output = Folder(absolute(os.fspath(url)))
    status(output.url)
    names = finished_tables(output)
    if not names:
        raise JobError(f"{url}: expected a finished table, found none; finish one with `clipray run`")
    names_of_jobs = [str(e["job"]) for e in read_events(output) if e["event"] == "run_started" and e.get("job")]
    job = Job(name=names_of_jobs[-1] if names_of_jobs else os.path.basename(output.url), output=output.url,
              steps=[{"report": {"of": names, "title": title}}])  # fmt: skip
    return run_job(job, **options)[0].page
