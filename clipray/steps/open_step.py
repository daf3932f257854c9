"""From a step's settings to the step itself, and its run."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from clipray.job import Encoding, ModelStep, Search, StepSettings
from clipray.job.load import step_kind
from clipray.steps.base.encode_step import EncodeStep
from clipray.steps.base.step import RunContext, StepContext, refuse_stale
from clipray.steps.base.table_step import TableStep
from clipray.steps.base.tar_manifest import with_indexed_tars
from clipray.tables import Record

_THEMES = {
    "encode": ["embed_images", "embed_regions", "render_depth", "embed_texts", "score_captions", "attack"],
    "vectors": ["reduce", "cluster", "deduplicate", "index", "project", "augment", "search"],
    "labels": ["label", "probe", "evaluate_labels", "refer"],
    "retrieval": ["evaluate_retrieval"],
}
_HOMES = {"report": "report", **{step: f"{theme}.{step}" for theme, steps in _THEMES.items() for step in steps}}


AnyStep = EncodeStep[Any] | TableStep[Any]


def check_ahead(settings: StepSettings, context: StepContext) -> None:
    """Before the first step starts: whether the network can do what a step that may come hours later asks of it.

    And whether a filter is one.

    Raises:
        ModelError: it cannot. JobError: it is none.
    """
    if isinstance(settings, ModelStep) and settings.needs_architecture:
        _home(settings).check_model(settings, context.model(settings))
    elif isinstance(settings, ModelStep) and settings.needs_text:
        context.model(settings)
    elif isinstance(settings, Search):
        _home(settings).check_ahead(settings)


def open_step(settings: StepSettings, context: StepContext) -> AnyStep:
    """Open and count the step's inputs, by the function `open_step` of the step's own module.

    Raises:
        ClipRayError: what the settings name is not there, or is not what the step needs.
    """
    if isinstance(settings, ModelStep) and settings.needs_text:
        context.model(settings)  # a vision model is refused whatever else there is to say
    if isinstance(settings, Encoding):
        settings = with_indexed_tars(settings, context)
    step: AnyStep = _home(settings).open_step(settings, context)
    return step


def run_step(step: AnyStep, run: RunContext) -> Record:
    """Make what is missing of the step's tables, from wherever the last run ended; commit.

    Raises:
        StaleTableError: they were made with other settings.
        ClipRayError: what is written by then is kept.
    """
    if not step.replaces_stale:
        refuse_stale(step.table, step.inspect(count=False))
    if isinstance(step, TableStep):
        return step.write_table(run)
    from clipray.steps.base.encode_run import encode_rows

    return encode_rows(step, run)


def _home(settings: StepSettings) -> ModuleType:
    return importlib.import_module(f"clipray.steps.{_HOMES[step_kind(settings)]}")
