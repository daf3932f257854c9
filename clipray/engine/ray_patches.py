"""What Ray starts for everybody, and a run on one machine has no use for.

Each is a process with Python and Ray in it, started while the encoders are, and Ray waits for some of them. There are no
options to leave them out, so methods of Ray are replaced for a while; where a Ray has no such method, it keeps its own.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.job_config import JobConfig


@contextlib.contextmanager
def without_helpers() -> Iterator[None]:
    """A Ray that starts here within the block has no dashboard, no autoscaler and no forwarding of logs: 3 core-seconds.

    `include_dashboard` leaves out only the page. The dashboard's part on each node is as in a Ray installed without one.
    """
    from ray._private import utils
    from ray._private.node import Node

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    missing = {"get_dashboard_dependency_error": lambda: ImportError("not wanted")}
    with _replaced(Node, dict.fromkeys(names, _nothing)), _replaced(utils, missing):
        yield


@contextlib.contextmanager
def without_our_path() -> Iterator[None]:
    """Workers of a Ray that is joined within the block do not get our working directory, nor our script's, on their
    module path: a `random.py` beside somebody's images must not run there.

    Ray leaves it out for jobs with a working directory of their own, so it is told that ours has one.
    """
    with _replaced(JobConfig, {"_runtime_env_has_working_dir": lambda _: True}):
        yield


@contextlib.contextmanager
def quiet_raylet() -> Iterator[None]:
    """Within the block Ray does not print what its processes complain of: their errors come as exceptions, or are looked for."""
    from ray._private import worker

    with _replaced(worker, {"print_to_stdstream": lambda *_, **__: None}):
        yield


@contextlib.contextmanager
def without_data_actors() -> Iterator[None]:
    """Ray Data collects no figures for a dashboard within the block, and has all of Ray's resources: 4 core-seconds.

    Else an actor of its own does each; the second divides a cluster among the data sets that are read at once.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import DefaultAutoscalingCoordinator
    from ray.data._internal.stats import _StatsManager

    figures = ("update_execution_metrics", "update_iteration_metrics", "register_dataset_to_stats_actor")
    collecting = {name: staticmethod(_nothing) for name in figures}
    naming = {"gen_dataset_id_from_stats_actor": staticmethod(lambda: uuid.uuid4().hex)}
    dividing = {"request_resources": _nothing, "cancel_request": _nothing, "get_reserved_resources": _all_resources}
    with _replaced(_StatsManager, {**collecting, **naming}), _replaced(DefaultAutoscalingCoordinator, dividing):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, methods: Mapping[str, Any]) -> Iterator[None]:
    kept = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    for name in kept:
        setattr(owner, name, methods[name])
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(owner, name, method)


def _nothing(*_: Any, **__: Any) -> None: ...


def _all_resources(_: Any) -> dict[str, dict[str, float]]:
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
