"""`clipray embed`: the job that it writes, and that a job which was started keeps its model and its images."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def test_tars_are_recognised_by_their_names_and_in_folders(tmp_path: Path) -> None:
    shards, mixed, packed = tmp_path / "shards", tmp_path / "mixed", tmp_path / "packed"
    for folder in (shards, mixed, packed):
        folder.mkdir()
    (shards / "0.tar").write_bytes(b"looked at when it runs")
    pq.write_table(pa.table({"key": ["a"], "url": ["/a.png"]}), shards / "0.parquet")
    (mixed / "0.tar").write_bytes(b"beside images")
    Image.new("RGB", (8, 8)).save(mixed / "a.png")
    (packed / "0.tar.gz").write_bytes(b"refused when it runs")

    def manifest(images: Path | str, out: str, **options: Any) -> Any:
        request = EmbedRequest(str(images), str(tmp_path / out), Model(name="demo"), **options)
        (step,) = steps_of(load_job(write_embed_job(request)))
        assert isinstance(step, EmbedImages)
        assert step.keep == [name.lower().removeprefix(".") for name in options.get("keep", ())]
        return step.manifest

    for source in (shards, packed, f"{shards}/{{0..9}}.tar", "s3://bucket/*.tar", "https://host/{a,b}.TAR"):
        assert manifest(source, "a") == ManifestColumns(tars=str(source))
    assert manifest(shards, "b", keep=[".TXT", "json"]) == ManifestColumns(tars=str(shards), columns=["txt", "json"])
    write_started(Folder(str(tmp_path / "b" / "images")), {"settings": {}, "fingerprint": "00"})
    assert manifest(shards, "b", keep=["txt", "json"]) == manifest(shards, "b", keep=[".TXT", "json"])
    with pytest.raises(StaleTableError, match="says manifest"):
        manifest(shards, "b")
    assert manifest(mixed, "c") == str(tmp_path / "c" / "manifest.parquet")
    for option in ({"label": "folder"}, {"columns": ListOptions(image_id="key")}):
        with pytest.raises(JobError, match="goes with other sources; "):
            manifest(shards, "d", **option)


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
