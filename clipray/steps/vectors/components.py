"""The components of a fitted reduction as a table: a row per component, and one for the mean."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.pca import Projection
from clipray.steps.base.table_step import FILE
from clipray.storage.folder import Folder

MEAN = -1  # `component` of the row that holds the mean


def components_table(fitted: Projection, n_features: int) -> pa.Table:
    """The mean and the k components as k + 1 rows."""
    schema = tables.arrow_schema("components", {"vector": n_features}, element="float64")
    k = len(fitted.variance)
    none = np.array([np.nan])

    def column(values: np.ndarray) -> pa.Array:
        return pa.array(np.concatenate([none, values]), pa.float64(), from_pandas=True)

    vectors = np.vstack([fitted.mean[None], fitted.components])
    return pa.table(
        [
            pa.array([MEAN, *range(k)], pa.int32()),
            column(fitted.variance),
            column(fitted.explained_variance_ratio),
            column(fitted.scale),
            tables.vector_array(vectors, schema.field("vector").type),
        ],
        schema=schema,
    )


def read_projection(folder: Folder) -> Projection:
    """What `components_table` wrote. Raises SchemaError where it is not there."""
    data = tables.read_shard(folder, FILE)
    order = np.argsort(data["component"].to_numpy())
    vectors = tables.matrix(data["vector"])[order]
    variance, ratio, scale = (data[name].to_numpy()[order][1:] for name in ("variance", "variance_ratio", "scale"))
    return Projection(vectors[0], vectors[1:], variance, ratio, scale)
