"""Settings of the steps that find vectors: `index`, `augment`, `search` and `evaluate_retrieval`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from clipray.job.base import TABLE_NAME, ColumnInput, Count, Execution, Reference, StepSettings, TableInput, added_later
from clipray.job.vectors import Column


class Index(StepSettings):
    """Vector column -> a FAISS index and the table of its ids.

    Attributes:
        type: a factory string of faiss (`HNSW32`, `IVF4096,Flat`, `OPQ32,IVF4096,PQ32`, …), or `auto`: chosen by rows
            and memory.
        metric: `cosine` (vectors are L2-normalised), `dot`, or `l2`.
        recall: the share of the true ten nearest that the index should find; `nprobe` or `efSearch` is tuned to reach
            it.
        queries: a vector column of the expected queries, as in `search`; by default new rows of the input.
        rows_per_task: the rows that a task adds to the index.
        memory_gib: what the index may take in memory; a larger one keeps its lists on disk. None: half of what Ray has.
    """

    uses_torch: ClassVar[bool] = True

    name: str = Field("index", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    type: str = "auto"
    metric: Literal["cosine", "l2", "dot"] = "cosine"
    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    queries: Annotated[str | Column | None, ColumnInput] = None
    random_state: Annotated[int, Field(ge=0)] = 0
    memory_gib: Annotated[float | None, Execution, Field(gt=0)] = None
    rows_per_task: Annotated[int, Execution, Field(ge=1)] = 65_536


class Augment(StepSettings):
    """Vector column and an index of it -> `augmented` table: each vector averaged with its nearest ones.

    Database-side augmentation (Turcot and Lowe 2009; Gordo et al. 2017, arXiv 1610.07940). The vectors stay comparable with
    the original ones.

    Attributes:
        index: an index of the same column, of this run or `FOLDER/table` of another.
        neighbours: the number of neighbours, without the row itself.
        alpha: neighbours are weighted by their similarity to this power (Radenović et al. 2018); 0: equally.
    """

    name: str = Field("augmented", pattern=TABLE_NAME)
    input: Annotated[str | Column, ColumnInput]
    index: Annotated[str, TableInput]
    neighbours: Count = 10
    alpha: Annotated[float, Field(ge=0)] = 3.0
    vector_type: Literal["float32", "float16"] = "float32"
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072


class Search(StepSettings):
    """Queries -> `neighbours` table: for each query the nearest rows of an index.

    Attributes:
        index: the index's table, of this run or `FOLDER/table` of another.
        queries: the queries' vector column: `texts.embedding`, `images.clip`, or any Parquet.
        where: a filter over the columns of the index's run, such as `label = 'cat' and width > 500`: only rows for which
            it is true are answers.
        leave_out_self: drop the row that has the query's own id.
        expand: average the query with this many of its first answers, and search again (query expansion, Chum et al.
            2007); `alpha`: answers are weighted by their similarity to this power (Radenović et al. 2018); 0: equally.
        rerank, rerank_top: an index over regions, which reorders the first `rerank_top` images by their region
            that is most like the query.
    """

    name: str = Field("neighbours", pattern=TABLE_NAME)
    index: Annotated[str, TableInput]
    queries: Annotated[str | Column, ColumnInput]
    top: Count = 10
    where: str | None = added_later(None)
    leave_out_self: bool = False
    expand: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(ge=0)] = 3.0
    rerank: Annotated[str | None, TableInput] = None
    rerank_top: Count = 100
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 131_072

    @property
    def reads_run(self) -> bool:
        return self.where is not None

    @model_validator(mode="after")
    def _rerank_covers_the_top(self) -> Search:
        if self.rerank is not None and self.rerank_top < self.top:
            raise ValueError(f"`rerank_top` is {self.rerank_top}, expected at least `top`, {self.top}")
        return self


class EvaluateRetrieval(StepSettings):
    """A vector column, or ranked lists, and a ground truth -> `retrieval`: average precision of each query.

    Attributes:
        input: the vectors that are ranked, all of them; or neighbours: a table of ranked lists, as `search` writes it.
        queries: vectors of the queries; by default they are rows of `input`, each left out of its own ranking.
        ground_truth: Parquet with a row for each image that is relevant to a query, or junk.
        query_id, answer_id: its columns; by default `query_id`, or `text_id` if there is none, and `image_id`.
        distances: the distances by which `input` is ranked.
    """

    name: str = Field("retrieval", pattern=TABLE_NAME)
    input: Annotated[str | Column | None, ColumnInput] = None
    queries: Annotated[str | Column | None, ColumnInput] = None
    neighbours: Annotated[str | None, TableInput] = None
    ground_truth: Annotated[str, Reference]
    query_id: Annotated[str | None, Reference] = None
    answer_id: Annotated[str, Reference] = "image_id"
    distances: list[Literal["cosine", "l2"]] = Field(["cosine", "l2"], min_length=1)

    @field_validator("distances")
    @classmethod
    def _once_each(cls, distances: list[Literal["cosine", "l2"]]) -> list[Literal["cosine", "l2"]]:
        return list(dict.fromkeys(distances))

    @model_validator(mode="after")
    def _one_way(self) -> EvaluateRetrieval:
        if (self.input is None) == (self.neighbours is None):
            raise ValueError(f"expected one of `input` and `neighbours`, found {'both' if self.input else 'none'}")
        if self.neighbours is not None and self.queries is not None:
            raise ValueError("`queries` goes with `input`: a table of neighbours names its queries itself")
        return self
