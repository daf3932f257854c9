"""clipray turns images and texts into Parquet tables that you can query.

The command's verbs as functions. They are imported when they are asked for: each of a run's workers imports this package,
and needs little of it. None of them imports torch or Ray before it must.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipray.errors import ClipRayError
    from clipray.inputs.make_manifest import make_manifest
    from clipray.job import Job, Model
    from clipray.job.load import load_job
    from clipray.runner.embed import embed
    from clipray.runner.plan import plan_job as plan
    from clipray.runner.run import run_job as run
    from clipray.runner.status import status
    from clipray.tables import iter_table, read_table, table_schema

__version__ = "0.1.0"
__all__ = [
    "ClipRayError",
    "Job",
    "Model",
    "embed",
    "iter_table",
    "load_job",
    "make_manifest",
    "plan",
    "read_table",
    "run",
    "status",
    "table_schema",
]
_HOMES = {
    "ClipRayError": "errors:ClipRayError",
    "Job": "job:Job",
    "Model": "job:Model",
    "embed": "runner.embed:embed",
    "iter_table": "tables:iter_table",
    "load_job": "job.load:load_job",
    "make_manifest": "inputs.make_manifest:make_manifest",
    "plan": "runner.plan:plan_job",
    "read_table": "tables:read_table",
    "run": "runner.run:run_job",
    "status": "runner.status:status",
    "table_schema": "tables:table_schema",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = _HOMES[name].partition(":")
    return getattr(import_module(f"clipray.{module}"), function)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
