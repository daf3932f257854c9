"""`clipray embed IMAGES OUT`: writes a job file, which can be resumed and edited, and runs it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipray.errors import JobError, ManifestError, StaleTableError
from clipray.inputs.image_listing import list_images
from clipray.inputs.image_lists import STDIN, ListOptions, is_list
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.parquet_files import expand_parquet
from clipray.inputs.tar_listing import folder_has_tars, is_tars
from clipray.inputs.usual_columns import usual_columns
from clipray.job import EmbedImages, ManifestColumns, Model
from clipray.job.load import dump_job, load_job, steps_of
from clipray.runner.run import run_job
from clipray.runner.status import TableStatus
from clipray.storage.environment import environment_errors
from clipray.storage.folder import Folder, absolute, filesystem
from clipray.tables.started import STARTED


@environment_errors()
def embed(
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: Model,
    manifest_label: str | None = None,
    columns: ListOptions | None = None,
    keep: Sequence[str] = (),
    **options: Any,
) -> tuple[str, list[TableStatus]]:
    """Write a job file for images into `out` and run it.

    Args:
        images: a folder or glob of images, a list of them, tars, or Parquet, whose columns are recognised by their usual
            names.
        manifest_label: as `label` of `make_manifest`.
        columns: names of columns of a list or of Parquet that need not be guessed.
        keep: columns to carry through; of tars, extensions such as txt.

    Returns:
        (path of the job file, statuses as of `run`). Called again with the same `out`, it resumes; a folder is listed
        again, so that new images are added.

    Raises:
        ClipRayError: as `run`.
    """
    request = EmbedRequest(os.fspath(images), os.fspath(out), model, manifest_label, columns or ListOptions(), keep)
    path = write_embed_job(request)
    return path, run_job(path, **options)


@dataclass(frozen=True)
class EmbedRequest:
    """What `embed` is asked for, see there."""

    images: str
    out: str
    model: Model
    label: str | None = None
    columns: ListOptions = field(default_factory=ListOptions)
    keep: Sequence[str] = ()


@environment_errors()
def write_embed_job(request: EmbedRequest, *, say: Callable[[str], None] | None = None) -> str:
    """The job file (and, for images that are in no Parquet yet, the manifest) of `embed`. Returns the job file's path."""
    home, images = Folder(absolute(request.out)), request.images
    if images == STDIN:
        raise JobError(
            "a run may be resumed, and standard input is read once: `clipray manifest - MANIFEST.parquet` first"
        )
    source, keep = absolute(images), list(request.keep)
    manifest: str | dict[str, Any]
    if _is_of_tars(source):
        manifest = _of_tars(source, request)
        keep = list(manifest.get("columns", ()))
    elif _is_manifest(source):
        manifest = _of_parquet(source, request, say)
    else:
        manifest = f"{home.url}/manifest.parquet"
        keep += ["label"] if request.label else []
        make_manifest(source, manifest, label=request.label, options=request.columns, say=say)
    values = {
        "name": Path(home.url).name,
        "output": home.url,
        "model": _written(request.model),
        "steps": [{"embed_images": {"manifest": manifest, **({"keep": keep} if keep else {})}}],
    }
    path = f"{home.url}/job.yaml"
    if home.read("job.yaml") is not None and _was_started(home):
        _check_same(path, request.model, manifest)
    else:
        home.write("job.yaml", dump_job(values))
    return path


def _of_tars(source: str, request: EmbedRequest) -> dict[str, Any]:
    """A job's `manifest` for tars. Raises JobError: an option that goes with other sources."""
    options = request.columns
    named = (
        ("--label", request.label),
        ("--images", options.images),
        ("--uri", options.uri),
        ("--id", options.image_id),
    )
    if option := next((name for name, value in named if value), None):
        raise JobError(f"{option} goes with other sources; {source} holds tars, in which an image is TAR/KEY")
    columns = {"columns": [extension.removeprefix(".").lower() for extension in request.keep]} if request.keep else {}
    return {"tars": source, **columns}


def _of_parquet(source: str, request: EmbedRequest, say: Callable[[str], None] | None) -> str | dict[str, Any]:
    """A job's `manifest` for Parquet. Raises JobError: an option that goes with other sources."""
    options = request.columns
    if request.label or options.images:
        option = "--label" if request.label else "--images"
        raise JobError(
            f"{option} goes with folders and lists of images; {source} is Parquet: `--keep` names its columns"
        )
    columns = usual_columns(source, options.uri, options.image_id)
    if not columns:
        return source
    if say:
        read = ", ".join(f"{name} {_shown(column)}" for name, column in columns.items())
        say(f"{source}: {read}")
    return {"path": source, **columns}


def _shown(column: str | dict[str, str]) -> str:
    return f"from `{column}`" if isinstance(column, str) else "from each row's file and number"


def _was_started(home: Folder) -> bool:
    return any(home.sub(name).read(STARTED) for name in home.folders())


def _is_of_tars(source: str) -> bool:
    """Whether it names tars, or is a folder with tars and without images of its own."""
    if is_tars(source):
        return True
    return not is_list(source) and folder_has_tars(source) and not _holds(source, list_images)


def _is_manifest(source: str) -> bool:
    if source.endswith((".parquet", ".pq")):
        return True
    if is_list(source):
        return False
    fs, path = filesystem(source)
    return fs.isdir(path) and not _holds(source, list_images) and _holds(source, expand_parquet)


def _holds(source: str, listed: Callable[[str], object]) -> bool:
    try:
        listed(source)
        return True
    except ManifestError:
        return False


def _written(model: Model) -> dict[str, Any]:
    """A model's settings as a job file has them."""
    return model.model_dump(exclude_none=True, exclude_defaults=True)


def _plain(manifest: str | list[str] | dict[str, Any] | ManifestColumns) -> Any:
    columns = ManifestColumns.model_validate(manifest) if isinstance(manifest, dict) else manifest
    return columns.model_dump(by_alias=True) if isinstance(columns, ManifestColumns) else columns


def _check_same(path: str, model: Model, manifest: str | dict[str, Any]) -> None:
    """Check that the job file, which may have been edited, still has the model and the manifest of the command."""
    job = load_job(path)
    step = steps_of(job)[0]
    assert isinstance(step, EmbedImages)
    for name, written, wanted in (
        ("model", job.model and _written(job.model), _written(model)),
        ("manifest", _plain(step.manifest), _plain(manifest)),
    ):
        if written != wanted:
            raise StaleTableError(
                f"{path} says {name} {written}, the command {wanted}: give another OUT, or edit the job and `clipray run` it"
            )
