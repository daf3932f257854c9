"""The settings of a job and of its steps, a module for each kind of step."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clipray.job.base import Encoding, Execution, ManifestColumns, Model, ModelStep, Settings, StepSettings
from clipray.job.images import FIXED_COLUMNS, SCHEMES, USER_AGENT, EmbedImages, Feature, FileEncoding
from clipray.job.labels import (
    CLASS_SETS,
    Classes,
    EvaluateLabels,
    Label,
    LabelSet,
    MultiLabel,
    Probe,
    Style,
    distinct,
    with_place,
)
from clipray.job.regions import OF_BOXES, VECTOR, Blur, Circle, EmbedRegions, Foveal, Refer, RenderDepth
from clipray.job.report import Report
from clipray.job.search import Augment, EvaluateRetrieval, Index, Search
from clipray.job.texts import EmbedTexts, ScoreCaptions
from clipray.job.typographic_attack import Attack, Lettering
from clipray.job.vectors import Cluster, Column, Deduplicate, Project, Reduce

STEPS: dict[str, type[StepSettings]] = {
    "embed_images": EmbedImages,
    "embed_regions": EmbedRegions,
    "render_depth": RenderDepth,
    "embed_texts": EmbedTexts,
    "reduce": Reduce,
    "cluster": Cluster,
    "deduplicate": Deduplicate,
    "index": Index,
    "project": Project,
    "augment": Augment,
    "search": Search,
    "evaluate_retrieval": EvaluateRetrieval,
    "label": Label,
    "probe": Probe,
    "evaluate_labels": EvaluateLabels,
    "score_captions": ScoreCaptions,
    "refer": Refer,
    "attack": Attack,
    "report": Report,
}
"""The steps a job can name, in the order in which data flows; each is the module of that name in `clipray.steps`."""


class Job(Settings):
    """A validated job: steps in the order in which data flows, and the model of those that name none of their own.

    Attributes:
        name: the job's name, for people.
        output: the run's folder: a path or any URL that fsspec knows.
        model: the model of all steps that encode and name none of their own.
        address: a Ray cluster: `auto` (the one of this node) or `HOST:PORT` of its head; by default `RAY_ADDRESS`, else
            this machine.
        steps: a mapping for each step: its name and its settings.
    """

    name: str = "clipray"
    output: str
    model: Model | None = None
    address: str | None = None
    steps: list[dict[str, Any]] = Field(min_length=1)


__all__ = [
    "CLASS_SETS", "FIXED_COLUMNS", "OF_BOXES", "SCHEMES", "STEPS", "USER_AGENT", "VECTOR", "Attack", "Augment", "Blur", "Circle", "Classes", "Cluster", "Column",
    "Deduplicate", "EmbedImages", "EmbedRegions", "EmbedTexts", "Encoding", "EvaluateLabels", "EvaluateRetrieval", "Execution", "Feature", "FileEncoding",
    "Foveal", "Index", "Job", "Label", "LabelSet", "Lettering", "ManifestColumns", "Model", "ModelStep", "MultiLabel", "Probe", "Project", "Reduce", "Refer", "RenderDepth", "Report", "ScoreCaptions", "Search", "Settings",
    "StepSettings", "Style", "distinct", "with_place",
]  # fmt: skip
