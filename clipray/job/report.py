"""Settings of the step that makes a page of a run."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from clipray.job.base import TABLE_NAME, Reference, StepSettings


class Report(StepSettings):
    """What a run wrote -> `report.html`, one page to look at, and the table of what is on it.

    Attributes:
        of: names of the tables that it shows; by default all that the job's earlier steps write.
        title: by default the job's name.
        label: the column of the images' table with what they are known to show. Where there is none, labels that
            were given take its place.
        points: of a plot, at most. examples: images of a cluster, of a label, or in the answers to a query, at most.
        thumbnail_px: of an image's longer side.
    """

    needs_cluster: ClassVar[bool] = False

    name: str = Field("report", pattern=TABLE_NAME)
    of: Annotated[list[str] | None, Reference] = Field(None, min_length=1)
    title: str | None = None
    label: str = "label"
    points: Annotated[int, Field(ge=10, le=10_000)] = 3_000
    examples: Annotated[int, Field(ge=1, le=24)] = 10
    thumbnail_px: Annotated[int, Field(ge=32, le=256)] = 128

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.of or ())
