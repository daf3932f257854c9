"""Settings of the steps that take a vector column: `reduce`, `cluster`, `deduplicate` and `project`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from clipray.job.base import (
    TABLE_NAME,
    ColumnInput,
    Count,
    Execution,
    Reference,
    Settings,
    StepSettings,
    TableInput,
    added_later,
)

OF_UMAP = ("sample_rows", "n_neighbors", "min_dist", "metric")
"""Settings of `project` that go with `method: umap`."""


class Column(Settings):
    """A vector column of any Parquet.

    Attributes:
        path: a file, a glob or a folder.
        column: the vector column.
        id: the column with the row's id.
    """

    path: str
    column: str
    id: str = "image_id"


class Reduce(StepSettings):
    """Vector column -> `reduced` table: principal components, optionally whitened.

    Give one of `components`, `explained_variance` and `fit`.

    Attributes:
        components: the number of components.
        explained_variance: the share of variance to reach with the fewest components.
        fit: the reduced table of another run, whose projection is applied unchanged.
        whiten: scale the components to unit variance.
        epsilon: whitening raises variances below this share of the largest to that share.
        shrinkage: whitening moves the variances towards their mean by this share.
        normalize: L2, `before`, `after` or `both`.
    """

    companion: ClassVar[str] = "components"

    name: str = Field("reduced", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    components: Annotated[int, Field(ge=1)] | None = None
    explained_variance: Annotated[float, Field(gt=0, le=1)] | None = None
    whiten: bool = False
    epsilon: Annotated[float, Field(ge=0, le=1)] = 1e-5
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.0
    normalize: Literal["none", "before", "after", "both"] = "none"
    fit: Annotated[str | None, Reference] = None
    vector_type: Literal["float32", "float16"] = "float32"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @model_validator(mode="after")
    def _one_way(self) -> Reduce:
        named = [name for name in ("components", "explained_variance", "fit") if getattr(self, name) is not None]
        if len(named) != 1:
            raise ValueError(
                f"expected one of `components`, `explained_variance` and `fit`, found {' and '.join(named) or 'none'}"
            )
        return self


class Cluster(StepSettings):
    """Vector column -> `clusters` table: K-means.

    Attributes:
        clusters: the number of clusters.
        tolerance: stop when the squared moves of all centroids add up to at most this share of a column's variance.
        n_init: the number of starts to try; the one with the lowest inertia after five iterations continues.
        normalize: `l2`: vectors have unit length.
        actors: the number of actors that hold the vectors, or `auto`.
        spherical: cluster by cosine; vectors and centroids are L2-normalised.
        mini_batch: move the centroids after this many rows, for tables that are too large for many passes; an
            iteration is then a pass over the table.
        hold: how the vectors are held in memory: `float32`, `float16` (half of it, and rounded), `none` (read again at
            each iteration, the same result), or `auto`: float32 where it fits, else none.
        precision: the precision of the product that ranks the centroids; `auto` is bf16 where the hardware multiplies
            it natively. Distances in the table are fp32 either way.
        labels: `table.column` with a label for each row, with which the clusters are compared.
    """

    companion: ClassVar[str] = "centroids"

    uses_torch: ClassVar[bool] = True

    name: str = Field("clusters", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    clusters: Annotated[int, Field(ge=1)]
    max_iterations: Annotated[int, Field(ge=1)] = 100
    tolerance: Annotated[float, Field(ge=0)] = 1e-4
    spherical: bool = False
    normalize: Literal["none", "l2"] = "none"
    random_state: Annotated[int, Field(ge=0)] = 0
    mini_batch: Count | None = None
    n_init: Count = added_later(1)
    hold: Literal["auto", "float32", "float16", "none"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    labels: Annotated[str | None, Execution] = None
    actors: Annotated[Literal["auto"] | Count, Execution] = "auto"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 1_048_576

    @model_validator(mode="after")
    def _batches_are_not_held(self) -> Cluster:
        if self.mini_batch is not None and self.hold in ("float32", "float16"):
            raise ValueError(f"`mini_batch` reads batch by batch and holds nothing: drop `hold: {self.hold}`")
        return self

    def identity(self) -> dict[str, Any]:
        rounded = "float16" if self.hold == "float16" else "float32"  # the others only differ in where vectors lie
        return {**super().identity(), "hold": rounded}


class Deduplicate(StepSettings):
    """Vector column and its clusters -> `duplicates` table: groups of rows that are nearly the same, and which to keep.

    Attributes:
        clusters: a table that `cluster` wrote, with all rows of the input; pairs within a cluster are compared.
        similarity: two rows with at least this cosine are near duplicates.
        keep: the row of each group to keep: the row `farthest` from its centroid (as in SemDeDup, Abbas et al. 2023,
            arXiv 2303.09540), the `nearest`, or the `first` by identity, which also breaks ties.
        rows_per_block: the rows that a task compares with the others of their cluster.
    """

    name: str = Field("duplicates", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    clusters: Annotated[str, TableInput]
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.95
    keep: Literal["farthest", "nearest", "first"] = "farthest"
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 32_768


class Project(StepSettings):
    """Vector column -> `map` table: a place on a plane for each row, by its principal components or by UMAP.

    Attributes:
        method: `pca`: the first two principal components; `umap`: UMAP, which keeps neighbours together (McInnes et al.
            2018, arXiv 1802.03426).
        sample_rows: UMAP is fitted on so many rows; the others are placed among them.
        n_neighbors, min_dist, metric: as umap-learn calls them.
        index: an index of the same column, of this run or `FOLDER/table` of another, for the nearest rows of each row.
        neighbours: how many of them, without the row itself.
    """

    name: str = Field("map", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    method: Literal["pca", "umap"] = "pca"
    sample_rows: Annotated[int, Field(ge=4, strict=True)] = 50_000
    n_neighbors: Annotated[int, Field(ge=2)] = 15
    min_dist: Annotated[float, Field(ge=0, le=1)] = 0.1
    metric: Literal["cosine", "euclidean", "manhattan", "correlation"] = "cosine"
    random_state: Annotated[int, Field(ge=0, lt=2**32)] = 0
    index: Annotated[str | None, TableInput] = None
    neighbours: Count = 15
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @model_validator(mode="after")
    def _settings_go_together(self) -> Project:
        for name in OF_UMAP:
            self.refuse_without(name, "method", "umap")
        if self.index is None and "neighbours" in self.model_fields_set:
            raise ValueError("`neighbours` goes with `index`, in which they are found")
        if self.sample_rows <= self.n_neighbors:
            raise ValueError(
                f"`sample_rows` is {self.sample_rows}, expected more than `n_neighbors`, {self.n_neighbors}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        unused = {*(() if self.method == "umap" else OF_UMAP), *(() if self.index else ("neighbours",))}
        return {name: value for name, value in super().identity().items() if name not in unused}
