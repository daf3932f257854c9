"""`clipray embed IMAGES OUT`: writes a job file, which can be resumed and edited, and runs it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipray.errors import JobError, ManifestError, StaleTableError
from clipray.inputs.image_listing import list_images
from clipray.inputs.image_lists import STDIN, is_list
from clipray.inputs.make_manifest import make_manifest
from clipray.inputs.parquet_files import expand_parquet
from clipray.job import EmbedImages, Model
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
    **options: Any,
) -> tuple[str, list[TableStatus]]:
    """Write a job file for a folder, glob or manifest into `out` and run it.

    Returns:
        (path of the job file, statuses as of `run`). Called again with the same `out`, it resumes; a folder is listed
        again, so that new images are added.

    Raises:
        ClipRayError: as `run`.
    """
    path = write_embed_job(os.fspath(images), os.fspath(out), model, manifest_label)
    return path, run_job(path, **options)


@environment_errors()
def write_embed_job(
    images: str, out: str, model: Model, label: str | None = None, *, say: Callable[[str], None] | None = None
) -> str:
    """The job file (and, for a folder or glob of images, the manifest) of `embed`. Returns the job file's path."""
    home = Folder(absolute(out))
    if images == STDIN:
        raise JobError(
            "a run may be resumed, and standard input is read once: `clipray manifest - MANIFEST.parquet` first"
        )
    source = absolute(images)
    if _is_manifest(source):
        manifest, keep = source, []
    else:
        manifest, keep = f"{home.url}/manifest.parquet", ["label"] if label else []
        make_manifest(source, manifest, label=label, say=say)
    values = {
        "name": Path(home.url).name,
        "output": home.url,
        "model": _written(model),
        "steps": [{"embed_images": {"manifest": manifest, **({"keep": keep} if keep else {})}}],
    }
    path = f"{home.url}/job.yaml"
    if home.read("job.yaml") is not None and _was_started(home):
        _check_same(path, model, manifest)
    else:
        home.write("job.yaml", dump_job(values))
    return path


def _was_started(home: Folder) -> bool:
    return any(home.sub(name).read(STARTED) for name in home.folders())


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


def _check_same(path: str, model: Model, manifest: str) -> None:
    """Check that the job file, which may have been edited, still has the model and the manifest of the command."""
    job = load_job(path)
    step = steps_of(job)[0]
    assert isinstance(step, EmbedImages)
    for name, written, wanted in (
        ("model", job.model and _written(job.model), _written(model)),
        ("manifest", step.manifest, manifest),
    ):
        if written != wanted:
            raise StaleTableError(
                f"{path} says {name} {written}, the command {wanted}: give another OUT, or edit the job and `clipray run` it"
            )
