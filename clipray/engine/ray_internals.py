"""Private names of Ray, all of them: what each is for, and how a run does without it.

A Ray that has a name no more costs speed, or a few lines on the terminal, and no correctness. `NAMES` lists them.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import ray

from clipray.errors import RunError

NAMES = {
    "helpers": "ray._private.node Node start_monitor start_log_monitor start_api_server",
    "full agent": "ray._private utils get_dashboard_dependency_error",
    "metrics": "ray.data._internal.stats _StatsManager register_dataset_to_stats_actor update_execution_metrics",
    "shares": "ray.data._internal.cluster_autoscaler DefaultAutoscalingCoordinator "
    "request_resources cancel_request get_reserved_resources",
    "driver path": "ray.job_config JobConfig _runtime_env_has_working_dir",
    "raylet's errors": "ray._private worker print_to_stdstream",
    "nodes to come": "ray._private.state state get_cluster_config",
    "blocks": "ray.data Dataset iter_internal_ref_bundles",
    "references": "ray.data._internal.execution.interfaces RefBundle block_refs",
    "sizes": "ray.data._internal.execution.interfaces RefBundle metadata",
}
"""Of each purpose the module, the object in it, and the attributes that are used."""

FinishedBlock = tuple[Any, int, int]
"""A block of the last operator: where it lies in the object store, its rows and its bytes."""


def finished_blocks(data: Any) -> Iterator[FinishedBlock]:
    """Run a data set and hand out its blocks as they come; they stay where they are.

    Without the private names each block passes through this process, and is copied into its object store.

    Raises:
        RunError: Ray Data handed out a part of a block.
    """
    if not all(_attribute(purpose) for purpose in ("blocks", "references", "sizes")):
        for table in data.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield ray.put(table), table.num_rows, table.nbytes
        return
    for bundle in data.iter_internal_ref_bundles():
        if any(getattr(bundle, "slices", None) or ()):
            raise RunError("Ray Data handed out a part of a block, which this version of clipray cannot write")
        for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
            yield ref, metadata.num_rows or 0, metadata.size_bytes or 0


@contextlib.contextmanager
def without_driver_path(options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`options` of `ray.init` by which workers do not get this process's working directory, nor its script's, on their
    module path: a `random.py` beside somebody's images must not run there.

    Ray leaves them out for jobs with a working directory of their own. It is told that ours has one; without the private
    name ours has an empty one, which Ray packs, sends and unpacks before the first worker starts.
    """
    if _attribute("driver path"):
        with _replaced("driver path", lambda _: True):
            yield dict(options)
        return
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if (submitted.get("runtime_env") or {}).get("working_dir"):
        yield dict(options)
        return
    with tempfile.TemporaryDirectory() as empty:
        yield {**options, "runtime_env": {**options.get("runtime_env", {}), "working_dir": empty}}


@contextlib.contextmanager
def without_helpers() -> Iterator[None]:
    """A Ray that starts here within the block has no autoscaler, no forwarding of logs and no dashboard, and the agent of a
    Ray installed without one. `include_dashboard` leaves out only the page; for the others there is no option.
    """
    minimal = _replaced("full agent", lambda: ImportError("not wanted"))
    with _replaced("helpers", _nothing, _nothing, _nothing), minimal:
        yield


@contextlib.contextmanager
def without_data_actors() -> Iterator[None]:
    """Within the block Ray Data collects no metrics for a dashboard, and has all of Ray's resources.

    Else it starts an actor for each; the second divides a cluster among data sets that run at once.
    """
    with (
        _replaced("metrics", staticmethod(_nothing), staticmethod(_nothing)),
        _replaced("shares", _nothing, _nothing, _all_resources),
    ):
        yield


def quiet_raylet() -> contextlib.AbstractContextManager[None]:
    """Within the block Ray does not print what its processes complain of: their errors come as exceptions, or are looked for."""
    return _replaced("raylet's errors", lambda *_, **__: None)


def nodes_to_come() -> list[Any]:
    """The groups of nodes that the cluster's autoscaler may start; none without the private name."""
    config = get_config() if (get_config := _attribute("nodes to come")) else None
    return list(config.node_group_configs) if config else []


def _nothing(*_: Any, **__: Any) -> None: ...


def _all_resources(*_: Any) -> dict[str, dict[str, float]]:
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _owner(purpose: str) -> Any:
    """The object whose attributes are used; None where this Ray has no such module or object."""
    module, name, *_ = NAMES[purpose].split()
    with contextlib.suppress(ImportError):
        return getattr(importlib.import_module(module), name, None)
    return None


def _attribute(purpose: str) -> Any:
    """What the only name of a purpose stands for; None where this Ray has none."""
    return getattr(_owner(purpose), NAMES[purpose].split()[-1], None)


@contextlib.contextmanager
def _replaced(purpose: str, *stand_ins: Any) -> Iterator[None]:
    """The names of a purpose stand for others within the block; all or none of them."""
    owner, (_, _, *names) = _owner(purpose), NAMES[purpose].split()
    before = {name: vars(owner)[name] for name in names if name in vars(owner)} if owner is not None else {}
    if len(before) < len(names):
        yield
        return
    for name, stand_in in zip(names, stand_ins, strict=True):
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(owner, name, method)
