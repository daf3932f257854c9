"""`clipray embed`: the job that it writes, and that a job which was started keeps its model and its images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipray.errors import JobError, StaleTableError
from clipray.inputs.image_lists import ListOptions
from clipray.job import EmbedImages, ManifestColumns, Model
from clipray.job.load import load_job, steps_of
from clipray.runner.embed import EmbedRequest, write_embed_job
from clipray.storage.folder import Folder
from clipray.tables.started import write_started


def test_a_job_that_was_started_keeps_its_model_and_its_images(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    path = write_embed_job(EmbedRequest(str(photos), str(out), Model(name="demo-rn")))
    again = write_embed_job(EmbedRequest(str(photos), str(out), Model(name="demo")))
    assert again == path  # nothing was started: written anew
    assert load_job(path).model == Model(name="demo")
    write_started(Folder(str(out / "images")), {"settings": {}, "fingerprint": "00"})
    before = Path(path).read_bytes()
    assert write_embed_job(EmbedRequest(str(photos), str(out), Model(name="demo"))) == path
    message = f"{path} says model {{'name': 'demo'}}, the command {{'name': 'demo-rn'}}: give another OUT"
    with pytest.raises(StaleTableError, match=re.escape(message)):
        write_embed_job(EmbedRequest(str(photos), str(out), Model(name="demo-rn")))
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image_id": ["a"], "uri": ["/a.png"]}), other)
    message = f"{path} says manifest {out}/manifest.parquet, the command {other}: give another OUT"
    with pytest.raises(StaleTableError, match=re.escape(message)):
        write_embed_job(EmbedRequest(str(other), str(out), Model(name="demo")))
    assert Path(path).read_bytes() == before


def test_the_columns_of_parquet_are_recognised_and_stand_in_the_job(tmp_path: Path) -> None:
    parquet, out, said = tmp_path / "laion.parquet", tmp_path / "out", list[str]()
    pq.write_table(pa.table({"URL": ["http://a/1.jpg"], "TEXT": ["a hen"]}), parquet)
    request = EmbedRequest(str(parquet), str(out), Model(name="demo"), keep=["TEXT"])
    path = write_embed_job(request, say=said.append)
    (step,) = steps_of(load_job(path))
    assert isinstance(step, EmbedImages)
    columns = {"path": str(parquet), "uri": "URL", "image_id": {"from": "row"}}
    assert (step.manifest, step.keep) == (ManifestColumns.model_validate(columns), ["TEXT"])
    assert said == [f"{parquet}: uri from `URL`, image_id from each row's file and number"]
    write_started(Folder(str(out / "images")), {"settings": {}, "fingerprint": "00"})
    assert write_embed_job(request) == path
    with pytest.raises(StaleTableError, match="says manifest"):
        write_embed_job(replace(request, columns=ListOptions(image_id="TEXT")))
    with pytest.raises(JobError, match="--label goes with folders and lists of images"):
        write_embed_job(replace(request, label="folder"))
