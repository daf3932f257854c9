"""clipray: a Parquet manifest of pictures in, tables that people can query out.

The command's verbs as functions. Importing the package imports neither torch nor Ray.
"""

from clipray.errors import ClipRayError
from clipray.job import load_job
from clipray.manifest import make_manifest
from clipray.oneline import embed
from clipray.runner import plan, run
from clipray.settings import Job, Model
from clipray.status import status
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
