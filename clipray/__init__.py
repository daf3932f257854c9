"""clipray: a Parquet manifest of pictures in, tables that people can query out.

The command's verbs as functions. They are imported when they are asked for: each of a run's workers imports this package,
and needs little of it. None of them imports torch or Ray before it must.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipray.errors import ClipRayError
    from clipray.job import load_job
    from clipray.manifest import make_manifest
    from clipray.oneline import embed
    from clipray.run_status import status
    from clipray.runner import plan, run
    from clipray.settings import Job, Model
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
_MODULES = {
    "errors": ("ClipRayError",),
    "job": ("load_job",),
    "manifest": ("make_manifest",),
    "oneline": ("embed",),
    "runner": ("plan", "run"),
    "settings": ("Job", "Model"),
    "run_status": ("status",),
    "tables": ("iter_table", "read_table", "table_schema"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"clipray.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
