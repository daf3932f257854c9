"""From a step's settings to the step itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipray.settings import Cluster, EmbedImages, Job, StepSettings
from clipray.steps import embed_images
from clipray.steps.step import Step
from clipray.storage import Folder


def check(settings: StepSettings, model: Callable[[], Any]) -> None:
    """Before the first step starts: what can be known of a step that may come hours later. Raises ModelError."""
    if isinstance(settings, EmbedImages) and settings.looks_inside:
        embed_images.layers_of(settings, model())


def prepare(settings: StepSettings, job: Job, output: Folder, model: Callable[[], Any]) -> Step:
    """Open and count the step's inputs. `model` gives the job's `ResolvedModel`, to those that ask.

    Raises:
        ClipRayError: what the settings name is not there, or is not what the step needs.
    """
    if isinstance(settings, EmbedImages):
        assert job.model is not None
        return embed_images.prepare(settings, output, job.model, model())
    if isinstance(settings, Cluster):
        from clipray.steps import cluster

        return cluster.prepare(settings, output)
    from clipray.steps import reduce

    return reduce.prepare(settings, output)
