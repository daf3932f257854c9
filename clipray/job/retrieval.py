"""Settings of the steps about finding images: `evaluate_retrieval`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clipray.job.base import TABLE_NAME, Reference, StepSettings
from clipray.job.vectors import Column, table_of

Distance = Literal["cosine", "l2"]


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
    input: Annotated[str | Column | None, Reference] = None
    queries: Annotated[str | Column | None, Reference] = None
    neighbours: Annotated[str | None, Reference] = None
    ground_truth: Annotated[str, Reference]
    query_id: Annotated[str | None, Reference] = None
    answer_id: Annotated[str, Reference] = "image_id"
    distances: list[Distance] = Field(["cosine", "l2"], min_length=1)

    @field_validator("distances")
    @classmethod
    def _once_each(cls, distances: list[Distance]) -> list[Distance]:
        return list(dict.fromkeys(distances))

    @model_validator(mode="after")
    def _one_way(self) -> EvaluateRetrieval:
        if (self.input is None) == (self.neighbours is None):
            raise ValueError(f"expected one of `input` and `neighbours`, found {'both' if self.input else 'none'}")
        if self.neighbours is not None and self.queries is not None:
            raise ValueError("`queries` goes with `input`: a table of neighbours names its queries itself")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        if self.neighbours is not None:
            return (self.neighbours,)
        columns = [source for source in (self.input, self.queries) if source is not None]
        return tuple(dict.fromkeys(name for source in columns for name in table_of(source)))
