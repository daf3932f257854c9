"""From a step's settings to the step itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from clipray.job import EmbedImages, EmbedRegions, RenderDepth, StepSettings
from clipray.job.load import step_kind
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import Step, StepContext
from clipray.steps.encode import embed_images, embed_regions, render_depth

_HOMES = {
    "embed_images": "encode.embed_images",
    "embed_regions": "encode.embed_regions",
    "render_depth": "encode.render_depth",
    "embed_texts": "encode.embed_texts",
    "score_captions": "encode.score_captions",
    "attack": "encode.attack",
    "reduce": "vectors.reduce",
    "cluster": "vectors.cluster",
    "deduplicate": "vectors.deduplicate",
    "index": "vectors.index",
    "augment": "vectors.augment",
    "search": "vectors.search",
    "label": "labels.label",
    "probe": "labels.probe",
    "evaluate_labels": "labels.evaluate_labels",
    "refer": "labels.refer",
    "evaluate_retrieval": "retrieval.evaluate_retrieval",
    "report": "report",
}


def check(settings: StepSettings, model: Callable[[], Any]) -> None:
    """Before the first step starts: what can be known of a step that may come hours later. Raises ModelError."""
    if isinstance(settings, EmbedImages) and settings.needs_architecture:
        embed_images.layers_of(settings, model())
    if isinstance(settings, EmbedRegions):
        embed_regions.look_inside(settings, model())
    if isinstance(settings, RenderDepth):
        render_depth.look_inside(settings, model())


def prepare(settings: StepSettings, given: StepContext) -> Step:
    """Open and count the step's inputs, by the function `prepare` of the step's own module.

    Raises:
        ClipRayError: what the settings name is not there, or is not what the step needs.
    """
    module = importlib.import_module(f"clipray.steps.{_HOMES[step_kind(settings)]}")
    step: Step = module.prepare(settings, given)
    return replace(step, retry=given.retry) if isinstance(step, EncodeStep) else step
