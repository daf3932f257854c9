"""Settings of the step that makes a page of a run."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from clipray.job.base import TABLE_NAME, Reference, StepSettings


class Report(StepSettings):
    """The tables of a run -> `report.html`, one page about them, and the table of its contents.

    Attributes:
        of: names of the tables that it shows; by default all that the job's earlier steps write.
        title: by default the job's name.
        label: the column of the images' table with their known labels. If there is none, the labels of a `label`
            step are used.
        points: the maximum number of points in a plot. examples: the maximum number of images of a cluster, of a label,
            or in
        the answers to a query.
        thumbnail_px: the longer side of an image on the page.
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
