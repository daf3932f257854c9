"""The jobs on the page about models are jobs."""

from __future__ import annotations

import re

from support import DOCS

from clipray.job.load import parse_job


def test_the_pages_jobs_are_valid() -> None:
    jobs = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "models.md").read_text(encoding="utf-8"), re.M | re.S)
    assert [len(parse_job(text).steps) for text in jobs] == [5]
