"""The JSON API over a small run: answers, conditions, batches, exports, and one line for each mistake."""

from __future__ import annotations

import io
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from starlette.testclient import TestClient

from clipray import read_table
from clipray.errors import JobError
from clipray.serve import app
from clipray.serve.options import ServeOptions


def png(side_px: int = 32, colour: str = "red") -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (side_px, side_px), colour).save(sink, "PNG")
    return sink.getvalue()


def hits(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    answer = client.get("/api/search", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["hits"]


def test_more_like_this_is_exact(client: TestClient, run: Path) -> None:
    images = read_table(run / "images")
    ids = images["image_id"].to_pylist()
    x = np.stack(images["clip"].to_numpy(zero_copy_only=False))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x[ids.index("03.jpg")]
    expected = [ids[n] for n in np.argsort(-cosines, kind="stable") if ids[n] != "03.jpg"]
    found = hits(client, like="03.jpg", top=5)
    assert [hit["image_id"] for hit in found] == expected[:5]
    assert [hit["score"] for hit in found] == pytest.approx(np.sort(cosines)[::-1][1:6], abs=1e-5)
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5]
    assert set(found[0]) == {"image_id", "score", "rank", "label"}  # the job kept its column `label`
    assert [hit["image_id"] for hit in hits(client, like="03.jpg", top=3, offset=2)] == expected[2:5]


def test_conditions_and_lists_without_a_query(client: TestClient) -> None:
    listed = client.get(
        "/api/search", params={"where": "label = 'round'", "top": 3, "column": ["label", "width"]}
    ).json()
    assert listed["rows"] == 12
    assert 0 < listed["matching"] < 12
    assert len(listed["hits"]) == 3
    assert {hit["label"] for hit in listed["hits"]} == {"round"}
    assert listed["hits"][0]["score"] is None
    assert isinstance(listed["hits"][0]["width"], int)
    found = hits(client, like="03.jpg", where="label = 'round'", top=12)
    assert len(found) == listed["matching"] - (hits(client, like="03.jpg", where="image_id = '03.jpg'") != [])
    assert {hit["label"] for hit in found} == {"round"}


def test_facets_count_what_matches(client: TestClient) -> None:
    whole = client.get("/api/facets").json()
    assert whole["rows"] == whole["matching"] == 12
    counts = dict(whole["facets"]["label"]["values"])
    assert sum(counts.values()) == 12
    part = client.get("/api/facets", params={"where": "label = 'round'", "column": "label"}).json()
    assert part["facets"]["label"]["values"] == [["round", counts["round"]]]
    assert part["matching"] == counts["round"]


def test_several_queries_at_once(client: TestClient) -> None:
    queries = [{"like": "03.jpg", "top": 2}, {"like": ["03.jpg", "04.jpg"], "unlike": ["05.jpg"], "top": 4}]
    answers = client.post("/api/search", json={"queries": queries}).json()["answers"]
    assert [len(answer["hits"]) for answer in answers] == [2, 4]
    assert answers[0]["hits"] == hits(client, like="03.jpg", top=2)
    assert not {"03.jpg", "04.jpg", "05.jpg"} & {hit["image_id"] for hit in answers[1]["hits"]}
    assert client.post("/api/search", json=queries[0]).json()["hits"] == answers[0]["hits"]


def test_words_and_uploaded_images(client: TestClient) -> None:
    uploaded = client.post("/api/images", content=png())
    assert uploaded.status_code == 201
    name = uploaded.json()["image"]
    assert (uploaded.json()["width"], uploaded.json()["height"]) == (32, 32)
    assert client.get(f"/upload/{name}").headers["content-type"] == "image/webp"
    by_image, by_words = hits(client, image=name, top=12), hits(client, text="a red square", top=12)
    mixed = hits(client, image=name, text="a red square", top=12)
    assert len(by_image) == len(by_words) == len(mixed) == 12
    by_minus = hits(client, text="a red square", minus="a circle", top=12)
    assert [hit["score"] for hit in by_minus] != [hit["score"] for hit in by_words]


def test_one_row_with_everything_known_of_it(client: TestClient) -> None:
    row = client.get("/api/rows/03.jpg").json()
    assert {"images", "clusters", "labels", "index"} <= row["tables"].keys()
    assert len(row["tables"]["labels"]) >= 1
    assert "clip" not in row["tables"]["images"][0]
    assert client.get("/api/rows/no/such/row").status_code == 404


@pytest.mark.parametrize("format", ["csv", "parquet", "manifest"])
def test_exports(client: TestClient, format: str) -> None:
    answer = client.get("/api/export", params={"like": "03.jpg", "top": 4, "format": format})
    if format == "manifest":  # of which the bytes of these images would be read
        assert answer.json()["error"].startswith("/data/before/images.parquet: ")
        return
    frame = (pl.read_csv if format == "csv" else pl.read_parquet)(io.BytesIO(answer.content))
    assert frame["image_id"].to_list() == [hit["image_id"] for hit in hits(client, like="03.jpg", top=4)]
    assert "attachment" in answer.headers["content-disposition"]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/search?like=../../etc/passwd", 400, "has no such row"),
        ("/api/search?text=" + "x" * 3_000, 400, "expected at most 2000 characters"),
        ("/api/search?top=0&like=03.jpg", 400, "top: expected 1 to 1000, found 0"),
        ("/api/search?top=ten", 400, "top: expected a whole number, found 'ten'"),
        ("/api/search?offset=999999", 400, "offset: expected 0 to 10000"),
        ("/api/search?where=lable='x'", 400, "did you mean 'label'?"),
        ("/api/search?where=(select 1)", 400, "where: "),
        ("/api/search?where=label in (select * from read_csv('/etc/passwd'))", 400, "where: "),
        ("/api/search?run=other", 404, "no run 'other', found: before"),
        ("/api/search?index=other&like=03.jpg", 404, "no index 'other', found: index"),
        ("/api/search?image=00ff", 404, "is not kept any more"),
        ("/api/search?url=http://example.org/x.jpg", 403, "--allow-urls"),
        ("/api/export?like=03.jpg&format=exe", 400, "format: expected one of csv, parquet, manifest"),
        ("/thumbnail/..%2F..%2Fetc%2Fpasswd", 404, "no image '../../etc/passwd'"),
        ("/thumbnail//etc/passwd", 404, "no image '/etc/passwd'"),
        ("/thumbnail/03.jpg?size=1000000", 400, "size: expected one of"),
    ],
)
def test_mistakes_are_one_line(client: TestClient, path: str, status: int, words: str) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "expected an object with a query, found list"),
        (b'{"txt": "x"}', "unknown 'txt'; expected text, minus"),
        (b'{"text": 1}', "text: expected a string or a list of strings"),
        (b'{"top": "5"}', "top: expected a whole number"),
        (b'{"queries": 1}', "queries: expected a list of at most"),
    ],
)
def test_wrong_bodies_are_one_line(client: TestClient, body: bytes, words: str) -> None:
    answer = client.post("/api/search", content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(range(256)) * 2, "not_an_image"),
        (b"", "not_an_image: 0 bytes"),
        (png()[:40], "undecodable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not_an_image"),
    ],
)
def test_what_is_no_image_is_refused(client: TestClient, data: bytes, words: str) -> None:
    answer = client.post("/api/images", content=data)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(words)


def test_a_decompression_bomb_is_refused(client: TestClient) -> None:
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "PNG")
    answer = client.post("/api/images", content=sink.getvalue())
    assert len(sink.getvalue()) < 100_000
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("too_many_pixels: ")


def test_the_description_names_all_addresses(client: TestClient) -> None:
    from clipray.serve.api import api_routes

    described = client.get("/api/openapi.json").json()
    assert described["openapi"].startswith("3.")
    named = {path.replace("{id}", "{id:path}") for path in described["paths"]}
    assert named == {route.path for route in api_routes()} - {"/api/openapi.json", "/upload/{name}"}  # type: ignore[attr-defined]


def test_runs_are_named_and_told_apart(run: Path) -> None:
    other = run.parent / "other" / "before"
    shutil.copytree(run, other)
    with TestClient(app(str(run), str(other)), base_url="http://localhost") as client:
        named = [of["run"] for of in client.get("/api/status").json()["runs"]]
        assert named == ["before", "other/before"]
        assert hits(client, like="03.jpg", run=named[1]) == hits(client, like="03.jpg")
    with pytest.raises(JobError, match="the run is named twice"):
        app(str(run), str(run))


def test_nothing_is_loaded_behind_a_server_that_has_ended(run: Path) -> None:
    """A process that ends in the middle of what it loads would abort."""
    with TestClient(app(str(run)), base_url="http://localhost") as client:
        assert client.get("/").status_code == 200
    assert "warm-up" not in [thread.name for thread in threading.enumerate()]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="expected the output folder of a run with a finished table, found none"):
        app(str(tmp_path))
    with pytest.raises(JobError, match="at least one run"):
        app()


def test_an_index_that_no_run_has_is_refused(run: Path) -> None:
    with pytest.raises(JobError, match=r"--index: no index 'indx', found: index; did you mean 'index'\?"):
        app(str(run), options=ServeOptions(index="indx"))
