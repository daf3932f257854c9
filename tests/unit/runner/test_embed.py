"""`clipray embed`: the job that it writes, and that a job which was started keeps its model and its images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from clipray.errors import StaleTableError
from clipray.job import Model
from clipray.job.load import load_job
from clipray.runner.embed import write_embed_job
from clipray.storage.folder import Folder
from clipray.tables.started import write_started


def test_a_job_that_was_started_keeps_its_model_and_its_images(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    path = write_embed_job(str(photos), str(out), Model(name="demo-rn"))
    assert write_embed_job(str(photos), str(out), Model(name="demo")) == path  # nothing was started: written anew
    assert load_job(path).model == Model(name="demo")
    write_started(Folder(str(out / "images")), {"settings": {}, "fingerprint": "00"})
    before = Path(path).read_bytes()
    assert write_embed_job(str(photos), str(out), Model(name="demo")) == path
    message = f"{path} says model {{'name': 'demo'}}, the command {{'name': 'demo-rn'}}: give another OUT"
    with pytest.raises(StaleTableError, match=re.escape(message)):
        write_embed_job(str(photos), str(out), Model(name="demo-rn"))
    other = tmp_path / "other.parquet"
    message = f"{path} says manifest {out}/manifest.parquet, the command {other}: give another OUT"
    with pytest.raises(StaleTableError, match=re.escape(message)):
        write_embed_job(str(other), str(out), Model(name="demo"))
    assert Path(path).read_bytes() == before
