"""What workers import ahead: nothing that none of a run's steps uses."""

from __future__ import annotations

from typing import Any

import pytest

from clipray.engine.fork_server import MODELS, VECTORS
from clipray.job import Job
from clipray.job.load import steps_of
from clipray.runner.run import imported_ahead

REDUCE = {"reduce": {"input": "images.clip", "components": 2}}
CLUSTER = {"cluster": {"input": "images.clip", "clusters": 2}}
EMBED = {"embed_images": {"manifest": "m.parquet"}}


@pytest.mark.parametrize(
    ("steps", "ahead"),
    [([REDUCE], ()), ([REDUCE, CLUSTER], VECTORS), ([EMBED, REDUCE], (*MODELS, *VECTORS))],
    ids=["without torch", "with torch", "models"],
)
def test_only_what_a_step_uses_is_imported_ahead(steps: list[dict[str, Any]], ahead: tuple[str, ...]) -> None:
    job = Job.model_validate({"output": "out", "model": {"name": "demo"}, "steps": steps})
    assert imported_ahead(job, steps_of(job)) == ahead
