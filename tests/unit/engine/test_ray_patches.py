"""What is changed in Ray for a run on one machine is as before afterwards; Ray has what is changed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from ray._private import utils, worker
from ray._private.node import Node
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator
from ray.data._internal.stats import _StatsManager
from ray.job_config import JobConfig

from clipray.engine.ray_patches import quiet_raylet, without_data_actors, without_helpers, without_our_path

HELPERS: list[tuple[Any, str]] = [(Node, n) for n in ("start_monitor", "start_log_monitor", "start_api_server")]
HELPERS += [(utils, "get_dashboard_dependency_error")]
OF_FIGURES = (
    "update_execution_metrics",
    "update_iteration_metrics",
    "register_dataset_to_stats_actor",
    "gen_dataset_id_from_stats_actor",
)
OF_RESOURCES = ("request_resources", "cancel_request", "get_reserved_resources")
ACTORS: list[tuple[Any, str]] = [(_StatsManager, n) for n in OF_FIGURES] + [
    (DefaultAutoscalingCoordinator, n) for n in OF_RESOURCES
]


PATH: list[tuple[Any, str]] = [(JobConfig, "_runtime_env_has_working_dir")]
PRINTING: list[tuple[Any, str]] = [(worker, "print_to_stdstream")]


@pytest.mark.parametrize(
    ("without", "changed"),
    [
        (without_helpers, HELPERS),
        (without_data_actors, ACTORS),
        (without_our_path, PATH),
        (quiet_raylet, PRINTING),
    ],
)
def test_ray_has_its_methods_again_afterwards(
    without: Callable[[], AbstractContextManager[None]], changed: list[tuple[Any, str]]
) -> None:
    before = [vars(owner)[name] for owner, name in changed]
    with contextlib.suppress(KeyError), without():
        for (owner, name), method in zip(changed, before, strict=True):
            assert vars(owner)[name] is not method
        raise KeyError
    assert [vars(owner)[name] for owner, name in changed] == before
