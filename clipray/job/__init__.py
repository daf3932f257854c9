"""The settings of a job and of its steps, a module for each kind of step."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from clipray.job.base import Encoding, Execution, ManifestColumns, Settings, StepSettings
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
from clipray.job.vectors import Cluster, Column, Deduplicate, Reduce

STEPS: dict[str, type[StepSettings]] = {
    "embed_images": EmbedImages,
    "embed_regions": EmbedRegions,
    "render_depth": RenderDepth,
    "embed_texts": EmbedTexts,
    "reduce": Reduce,
    "cluster": Cluster,
    "deduplicate": Deduplicate,
    "index": Index,
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


class Model(Settings):
    """An open_clip model.

    Attributes:
        name: an open_clip name (`ViT-B-32`), `hf-hub:org/model`, `local-dir:/path`, the path of an open_clip config
            (`*.json`), or the built-in `demo` (a ViT) or `demo-rn` (a ResNet).
        pretrained: a tag of that name, the path or URL of a checkpoint, or `random`.
        seed: the seed of the random weights, with `pretrained: random` only.
        precision: `auto` is bf16 where the hardware multiplies it natively, else fp32.
    """

    name: str
    pretrained: str | None = None
    seed: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @model_validator(mode="after")
    def _random_needs_a_seed(self) -> Model:
        if self.pretrained == "random" and self.seed is None:
            raise ValueError("`pretrained: random` needs a `seed`, so that every worker draws the same weights")
        if self.pretrained != "random" and self.seed is not None:
            raise ValueError("`seed` goes with `pretrained: random` only")
        return self


class Job(Settings):
    """A validated job: a model and the steps that use it, in the order in which data flows.

    Attributes:
        name: the job's name, for people.
        output: the run's folder: a path or any URL that fsspec knows.
        model: the model of steps that encode; other jobs need none.
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
    "Foveal", "Index", "Job", "Label", "LabelSet", "Lettering", "ManifestColumns", "Model", "MultiLabel", "Probe", "Reduce", "Refer", "RenderDepth", "Report", "ScoreCaptions", "Search", "Settings",
    "StepSettings", "Style", "distinct", "with_place",
]  # fmt: skip
