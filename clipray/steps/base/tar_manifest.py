"""Manifests of tars: their row index is brought up to date, and read as Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from clipray.inputs.tar_index import FOLDER, Group, IndexFile, index_group, index_tars
from clipray.inputs.tar_listing import list_tars
from clipray.inputs.tar_samples import Wanted
from clipray.job import Encoding, ManifestColumns
from clipray.steps.base.step import StepContext


def with_indexed_tars(settings: Encoding, context: StepContext) -> Encoding:
    """The settings, with the Parquet of the index in place of tars.

    Raises:
        ManifestError: tars that are not there or cannot be read, or no images in them.
    """
    source = settings.manifest
    if not isinstance(source, ManifestColumns) or source.tars is None:
        return settings
    tars, folder = list_tars(source.tars), context.output.sub(FOLDER)
    wanted = Wanted(source.image or "", tuple(source.texts))
    running = context.cluster is not None  # a plan leaves alone what a run may be reading
    urls = index_tars(tars, wanted, folder, partial(_index, settings.name, context), tidy=running)
    columns = {**source.columns, **source.made_ids, "version": "version"}
    return settings.model_copy(update={"manifest": ManifestColumns.model_validate({"path": urls, **columns})})


def _index(name: str, context: StepContext, groups: Sequence[Group]) -> Iterable[IndexFile]:
    """Makes files of the index: in Ray tasks, unless there is only one, or nothing is run."""
    count = sum(len(group.tars) for group in groups)
    context.say(f"{name}: reads the headers of {count} tar{'s' if count > 1 else ''}")
    if context.cluster is None or len(groups) == 1:
        return map(index_group, groups)
    from clipray.engine.tasks import map_tasks

    return map_tasks(index_group, groups, context.cluster().cpus, lambda _: None)
