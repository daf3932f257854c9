"""The JSON Schema of job files: the one in the repository is today's, and it says of jobs what the reader says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from support import BLOCK, DOCS, ROOT, clipray_here

from clipray.errors import JobError
from clipray.job.json_schema import job_schema
from clipray.job.load import dump_job, parse_job

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
FILE = ROOT / "schemas" / "job.schema.json"
SCHEMA = Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = [
    pytest.param({"output": "out", "model": {"name": "demo"}, **job}, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if language == "yaml" and isinstance(job := yaml.safe_load(text), dict) and "steps" in job
]


def job_of(*steps: Any, **settings: Any) -> dict[str, Any]:
    return {"output": "out", "model": {"name": "demo"}, "steps": list(steps), **settings}


def read(job: dict[str, Any]) -> bool:
    """Whether the reader accepts a job."""
    try:
        parse_job(dump_job(job).decode())
    except JobError:
        return False
    return True


def test_the_file_is_what_the_command_prints(tmp_path: Path) -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    assert clipray_here(["schema", "job"], tmp_path) == FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_ready_made_jobs_name_it_and_fit(path: Path) -> None:
    first, _, text = path.read_text(encoding="utf-8").partition("\n")
    assert (
        path.parent / first.removeprefix("# yaml-language-server: $schema=")
        == ROOT / "jobs" / "../schemas/job.schema.json"
    )
    SCHEMA.validate(yaml.safe_load(text))


@pytest.mark.parametrize("job", EXAMPLES)
def test_examples_of_the_pages_fit(job: dict[str, Any]) -> None:
    SCHEMA.validate(job)
    assert read(job)


def test_pages_have_examples() -> None:
    assert len(EXAMPLES) >= 10


INDEX = {"index": {"input": "images.clip"}}
IMAGES = {"manifest": "m.parquet"}


@pytest.mark.parametrize(
    "step",
    [
        {"report": None},
        {"report": {}},
        {"embed_images": {"manifest": ["a.parquet", "b/*.parquet"]}},
        {"embed_images": {**IMAGES, "actors": 2, "batch_size": "auto", "long_side_px": None}},
        {"embed_images": {**IMAGES, "actors": [1, 8], "gpus_per_actor": 0.5, "encode_on": {"tier": "!spot"}}},
        {"embed_images": {**IMAGES, "features": {"a": {}, "b": {"layer": "stem", "pooling": "mac", "regions": True}}}},
        {"embed_images": {**IMAGES, "features": {"b": {"layer": "stem", "pooling": "mac", "regions": "grid"}}}},
        {"embed_regions": {**IMAGES, "foveal": {"blocks": "all", "heads": [0, 1]}}},
        {"embed_regions": {**IMAGES, "foveal": {"mask": "falip", "blocks": [8, 9]}}},
        {"reduce": {"input": {"path": "x.parquet", "column": "v", "id": "key"}, "components": 8}},
        {"cluster": {"input": "images.clip", "clusters": "1_000", "tolerance": "1e-5", "spherical": "yes"}},
        {"label": {"input": "images.clip", "classes": "imagenet"}},
        {"label": {"input": "images.clip", "classes": ["a", "b"], "styles": ["template", "description"]}},
        {"label": {"input": "images.clip", "classes": {"names": ["a"], "templates": ["a {}"]}, "styles": {"x": {}}}},
        {"attack": {**IMAGES, "classes": ["a", "b"], "style": {"prompt": "template"}}},
        {"probe": {"input": "images.clip", "truth": {"path": "x.parquet", "column": "label"}, "c": [1, 0.1]}},
        {"evaluate_labels": {"sets": {"a": {"labels": "labels", "truth": "images.label"}}}},
    ],
    ids=lambda step: "-".join(map(str, [*step, *(next(iter(step.values())) or ())])),
)  # fmt: skip
def test_shorthands_fit(step: dict[str, Any]) -> None:
    """In YAML 1.1, as the reader has it, `1_000` is a number and `yes` is true; to editors they are text."""
    SCHEMA.validate(job_of(step))
    text = json.dumps(step)
    for word in ("1_000", "1e-5", "yes"):
        text = text.replace(f'"{word}"', word)
    plain = yaml.safe_load(text)
    SCHEMA.validate(job_of(plain))
    assert read(job_of(plain))


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"output": "out"},
        job_of(),
        job_of(INDEX, output=5),
        job_of(INDEX, model="demo"),
        job_of(INDEX, model={"name": "demo", "pretraned": "x"}),
        job_of(INDEX, outptu="out"),
        job_of("report"),
        job_of({}),
        job_of({**INDEX, "report": {}}),
        job_of({"embed_image": IMAGES}),
        job_of({"index": None}),
        job_of({"index": ["images.clip"]}),
        job_of({"index": {"input": "images.clip", "recal": 0.9}}),
        job_of({"index": {"input": "images.clip", "recall": 1.5}}),
        job_of({"index": {"input": {"path": "x.parquet"}}}),
        job_of({"index": {"input": "images.clip", "metric": "manhattan"}}),
        job_of({"index": {"input": "images.clip", "name": "a/b"}}),
        job_of({"embed_images": {**IMAGES, "actors": [1, 2, 3]}}),
        job_of({"embed_images": {**IMAGES, "actors": "many"}}),
        job_of({"embed_images": {**IMAGES, "keep": "label"}}),
        job_of({"embed_images": {**IMAGES, "features": {"a": {"layr": "stem"}}}}),
        job_of({"embed_images": {"manifest": 5}}),
    ],
    ids=str,
)
def test_wrong_jobs_are_refused_by_both(job: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(job)
    assert not read(job)


def test_every_setting_has_a_description() -> None:
    schema = job_schema()
    mappings = {"job": schema, **schema["$defs"]}
    assert [
        f"{name}.{key}"
        for name, mapping in mappings.items()
        for key, setting in mapping["properties"].items()
        if not setting.get("description")
    ] == []


def test_a_description_ends_where_that_of_another_setting_begins() -> None:
    settings = job_schema()["$defs"]
    assert {
        settings[step]["properties"]["name"]["description"] for step in ("EmbedImages", "EmbedTexts", "Report")
    } == {"the name of the step and of the table that it writes."}
