"""`clipray search` over a small run: words, pictures and rows as queries; regions; the page; what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support import clipray_here

import clipray
from clipray import tables
from clipray.demo.world import write_world
from clipray.errors import ClipRayError, JobError, SchemaError
from clipray.job import Job, Model, Search
from clipray.models.resolve import resolve
from clipray.models.text_encoder import TextEncoder
from clipray.queries.search import search
from clipray.queries.search_page import search_page
from clipray.steps.base.step import StepContext
from clipray.steps.open_step import check_ahead
from clipray.steps.open_step import open_step as open_search
from clipray.storage.folder import Folder

WHERE = "cluster_id = 1 and width > 1"
DEEP = {"layer": "block.2", "pooling": "mac", "levels": 2, "regions": "grid"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ray_here: None) -> str:
    home = tmp_path_factory.mktemp("search")
    world = write_world(home / "world", seed=1, n_scenes=40, n_groups=8, n_words=0, n_places=0)
    embed = {"manifest": str(world.images), "features": {"clip": {"layer": "output"}, "deep": DEEP}}
    nearest = {"index": "deep", "queries": "images.deep", "top": 4, "rerank_top": 12}
    steps = [
        {"embed_images": embed},
        {"index": {"input": "images.clip"}},
        {"index": {"name": "deep", "input": "images.deep"}},
        {"index": {"name": "deep_regions", "input": "regions.deep"}},
        {"cluster": {"input": "images.clip", "clusters": 4}},
        {"search": {"name": "filtered", "index": "index", "queries": "images.clip", "top": 3, "where": WHERE}},
        {"search": {"name": "expanded", "index": "index", "queries": "images.clip", "expand": 2, "where": WHERE}},
        {"search": {"name": "plain", **nearest}},
        {"search": {"name": "reranked", "rerank": "deep_regions", **nearest}},
    ]
    (home / "j.yaml").write_text(
        yaml.safe_dump({"output": str(home / "out"), "model": {"name": "demo"}, "steps": steps})
    )
    clipray.run(str(home / "j.yaml"))
    return str(home / "out")


def vectors(run: str, table: str, column: str, key: str = "image_id") -> dict[str, np.ndarray]:
    data = tables.read_table(f"{run}/{table}", [key, column])
    return dict(zip(data[key].to_pylist(), np.stack(data[column].to_numpy()), strict=True))


def test_words_find_what_brute_force_finds(run: str) -> None:
    answer = search(run, "a green triangle", index="index", top=6)
    text = TextEncoder(resolve(Model(name="demo")), precision="fp32", batch_size=1).encode(["a green triangle"])[0][0]
    cosines = {key: float(vector @ text) for key, vector in vectors(run, "images", "clip").items()}
    assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5, 6]
    assert [hit.score for hit in answer.hits] == pytest.approx(sorted(cosines.values(), reverse=True)[:6], abs=1e-5)
    assert all(hit.score == pytest.approx(cosines[hit.image_id], abs=1e-5) for hit in answer.hits)
    assert all(Path(hit.uri).is_file() for hit in answer.hits)


def test_a_mixture_among_some_rows_finds_what_brute_force_finds(run: str) -> None:
    known = vectors(run, "images", "clip")
    names = list(known)
    encoder = TextEncoder(resolve(Model(name="demo")), precision="fp32", batch_size=2)
    red, word = encoder.encode(["a red circle", "a word"])[0]
    query = red - word + known[names[0]] + known[names[1]]
    where = f"image_id in ({', '.join(map(repr, names[::2]))}) and width > 1"
    options = {"like": names[:2], "minus": ["a word"], "where": where, "columns": ["width"]}
    answer = search(run, "a red circle", index="index", top=5, **options)
    cosines = {key: float(known[key] @ query) / np.linalg.norm(query) for key in names[2::2]}
    assert [hit.score for hit in answer.hits] == pytest.approx(sorted(cosines.values(), reverse=True)[:5], abs=1e-5)
    assert all(hit.score == pytest.approx(cosines[hit.image_id], abs=1e-5) for hit in answer.hits)
    assert {hit.values["width"] for hit in answer.hits} == {192}


def test_a_picture_finds_itself_and_a_row_does_not(run: str) -> None:
    first = search(run, "a red circle", index="index", top=1).hits[0]
    again = search(run, image=first.uri, index="index", top=2).hits
    assert again[0].image_id == first.image_id
    assert again[0].score > 0.999
    like = search(run, like=first.image_id, index="index", top=1).hits
    assert like[0].image_id == again[1].image_id


def test_regions_have_boxes(run: str) -> None:
    names = list(vectors(run, "regions", "deep", "region_id"))
    answer = search(run, like=names[7], by_region=True, top=5)
    assert len({hit.region_id for hit in answer.hits}) == 5
    for hit in answer.hits:
        assert hit.region_id is not None
        assert hit.region_id.startswith(hit.image_id)
        assert hit.box is not None
        assert hit.box[0] < hit.box[2]
    page = search_page(answer, "regions")
    assert page.count("<i style=") == 5


def test_reranking_is_by_the_most_similar_region(run: str) -> None:
    pictures, regions = vectors(run, "images", "deep"), vectors(run, "regions", "deep", "region_id")
    unit = {key: value / np.linalg.norm(value) for key, value in {**pictures, **regions}.items()}
    names = sorted(pictures)
    found = tables.read_table(f"{run}/reranked").to_pylist()
    assert len(found) == 4 * len(pictures)
    for query in names[::9]:
        short = sorted(names, key=lambda name: -float(unit[query] @ unit[name]))[:12]
        best = {
            name: max((float(unit[query] @ unit[key]), key) for key in regions if key.startswith(f"{name}#"))
            for name in short
        }
        expected = sorted(best.values(), reverse=True)[:4]
        mine = [row for row in found if row["query_id"] == query]
        assert [row["score"] for row in mine] == pytest.approx([score for score, _ in expected], abs=1e-5)
        assert all(best[row["image_id"]][0] == pytest.approx(row["score"], abs=1e-5) for row in mine)
        assert all(row["region_id"].startswith(row["image_id"]) for row in mine)


def test_the_step_answers_with_rows_that_match(run: str) -> None:
    known = vectors(run, "images", "clip")
    cluster_of = {row["image_id"]: row["cluster_id"] for row in tables.read_table(f"{run}/clusters").to_pylist()}
    matching = [name for name, cluster in cluster_of.items() if cluster == 1]
    answers = tables.read_table(f"{run}/filtered").to_pylist()
    assert len(answers) == len(known) * min(3, len(matching))
    for query in list(known)[::7]:
        exact = sorted((float(known[query] @ known[name]) for name in matching), reverse=True)[:3]
        mine = [row for row in answers if row["query_id"] == query]
        assert [row["score"] for row in mine] == pytest.approx(exact, abs=1e-5)
        assert {row["image_id"] for row in mine} <= set(matching)
        unit = known[query] / np.linalg.norm(known[query])
        best = sorted(matching, key=lambda name: -float(unit @ known[name]))[:2]
        mixed = unit + sum(float(unit @ known[name]) ** 3 * known[name] for name in best)
        first = max(float(mixed @ known[name]) for name in matching) / np.linalg.norm(mixed)
        rows = [row for row in tables.read_table(f"{run}/expanded").to_pylist() if row["query_id"] == query]
        assert rows[0]["score"] == pytest.approx(first, abs=1e-4)


def test_a_change_of_what_a_filter_reads_makes_the_answers_stale(run: str) -> None:
    output = Folder(run)
    settings = Search(index="index", queries="images.clip", name="filtered", top=3, where=WHERE)
    context = StepContext(Job(output=run, steps=[{"report": {}}]), output, resolve)
    step = open_search(settings, context)
    assert step.inspect().status == "finished"
    assert step.filtered_by.keys() == {"clusters", "images"}
    before = tables.read_record(output.sub("clusters"))
    assert before is not None
    for changed, status in (
        (replace(before, fingerprint="0123456789abcdef"), "stale"),
        (replace(before, files=[{**file, "sha256": "0" * 64} for file in before.files]), "partial"),
    ):
        assert replace(step, filtered_by={**step.filtered_by, "clusters": changed}).inspect().status == status
    for where, message in (("hue = 1", "filtered: no column 'hue'"), ("width", "filtered: where: 'width' is of type")):
        with pytest.raises(SchemaError, match=message):
            open_search(settings.model_copy(update={"where": where}), context)
    with pytest.raises(JobError, match="SELECT is not allowed"):
        check_ahead(settings.model_copy(update={"where": "width IN (SELECT 1)"}), context)


def test_a_plan_waits_for_the_tables_that_a_filter_may_read(run: str, tmp_path: Path) -> None:
    job = yaml.safe_load((Path(run).parent / "j.yaml").read_text())
    label = {"label": {"input": "images.clip", "classes": ["a dog", "a cat"]}}
    wanted = {"name": "labelled", "index": "index", "queries": "images.clip", "where": "labels.label = 'a dog'"}
    job["steps"] += [label, {"search": wanted}]
    (tmp_path / "j.yaml").write_text(yaml.safe_dump(job))
    statuses, lines = clipray.plan(str(tmp_path / "j.yaml"))
    assert (statuses[-1].name, statuses[-1].note) == ("labelled", "waits for labels, labels_classes")
    assert "labelled: no column 'labels.label'" in lines[-1]


def test_the_command_and_its_page(run: str, tmp_path: Path) -> None:
    query = 'a blue ring <script>alert("x")</script>'
    words = ["search", run, query, "--index", "index", "--top", "3", "--json", "--html", "a.html"]
    hits = json.loads(clipray_here(words, tmp_path))
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert set(hits[0]) == {"rank", "image_id", "score", "uri", "region_id", "box"}
    kept = ["--where", "height < 9999", "--columns", "width, image_id", "--minus", "a word"]
    for hit in json.loads(clipray_here([*words, *kept], tmp_path)):
        assert hit["values"] == {"width": 192, "image_id": hit["image_id"]}
    assert "│ 192 " in clipray_here([*words[:7], *kept], tmp_path)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script>" not in page
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(pictures) == 3
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert max(picture.size) <= 320
    assert "http" not in page


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (
            {"text": "x", "index": "deep"},
            "index deep holds vectors of layer 'block.2': words and new images cannot be",
        ),
        ({}, "expected a query: words, --image PATH or --like ID"),
        ({"text": " "}, "expected a query"),
        ({"text": "x", "minus": [""]}, "expected a query"),
        ({"minus": ["x"]}, "expected a query"),
        ({"text": "x", "like": "y", "index": "index"}, "--like y: index index has no such row"),
        ({"text": "x", "where": "hue = 1", "index": "index"}, "no column 'hue', found: image_id, uri, "),
        ({"text": "x", "where": "width in (select 1)", "index": "index"}, "where: SELECT is not allowed"),
        ({"text": "x", "columns": ["hue"], "index": "index"}, "no column 'hue'"),
        ({"text": "x"}, "there are several: deep, index; choose one with --index"),
        ({"text": "x", "index": "images"}, "holds no finished index"),
        ({"like": "nobody", "index": "index"}, "--like nobody: index index has no such row; it has '"),
        ({"image": "/nowhere.jpg", "index": "index"}, "--image /nowhere.jpg: not_found"),
        ({"text": "x", "index": "index", "model": Model(name="demo-rn")}, "made with other weights of demo"),
    ],
)
def test_what_cannot_be_answered_is_told(run: str, query: dict, message: str) -> None:
    text = query.pop("text", None)
    with pytest.raises(ClipRayError, match=message):
        search(run, text, **query)
