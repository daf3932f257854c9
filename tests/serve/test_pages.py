"""The pages: every link of a run whose tables are hostile leads somewhere, and shows as text what the tables hold."""

from __future__ import annotations

import html
import io
import re
import shutil
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from serve.conftest import IDS, MARKUP, ROWS
from starlette.testclient import TestClient

from clipray.errors import JobError
from clipray.serve import app
from clipray.serve.pages.conditions import between, column_name, contains, equals, has, toggled

RAW = ("<script>alert", "<img src=x", "\x1b", 'style="')
OF_ONE_SHAPE = 6  # addresses that differ by their values only


@pytest.fixture(scope="module")
def client(hostile_run: str) -> Iterator[TestClient]:
    with TestClient(app(hostile_run), base_url="http://localhost") as client:
        yield client


def shape_of(address: str) -> tuple[str, ...]:
    """What addresses of the same page have in common."""
    parts = urllib.parse.urlsplit(address)
    names = {name for name, _ in urllib.parse.parse_qsl(parts.query)}
    return parts.path.split("/")[1], str(parts.path.count("/")), *sorted(names)


def links_of(page: str, address: str) -> Iterator[str]:
    for link in re.findall(r'(?:href|src|data-from|data-points)="([^"]*)"', page):
        yield urllib.parse.urljoin(address, html.unescape(link)).split("#")[0]


def test_every_link_leads_to_a_page_that_shows_hostile_values_as_text(client: TestClient) -> None:
    todo, seen, of_shape = deque(["/"]), {"/"}, Counter[tuple[str, ...]]()
    pages = set()
    while todo:
        address = todo.popleft()
        answer = client.get(address)
        is_gone = address.startswith("/thumbnail/") and answer.status_code == 404
        assert answer.status_code == 200 or (is_gone and "cannot be shown" in answer.json()["error"]), (
            address,
            answer.text,
        )
        if "text/html" not in answer.headers["content-type"] or address.startswith("/report"):
            continue
        pages.add(shape_of(address)[0])
        text = re.sub(r' value="[^"]*"', "", answer.text)  # a form sends back what it was sent
        assert not [raw for raw in RAW if raw in text], address
        for link in links_of(answer.text, address):
            assert link.startswith("/"), link
            of_shape[shape_of(link)] += 1
            if link not in seen and of_shape[shape_of(link)] <= OF_ONE_SHAPE:
                seen.add(link)
                todo.append(link)
    assert pages >= {"", "search", "rows", "clusters", "labels", "duplicates", "rejects", "tables", "map", "api"}


@pytest.mark.parametrize("row_id", IDS[:5])
def test_a_row_with_any_id_has_its_page_its_image_and_its_neighbours(client: TestClient, row_id: str) -> None:
    path = urllib.parse.quote(row_id, safe="")
    page = client.get(f"/rows/{path}")
    assert page.status_code == 200
    assert "48 × 32 px" in page.text
    assert page.text.count('<li class="tile') == 12
    assert client.get(f"/thumbnail/{path}?size=160").headers["content-type"] == "image/webp"


@pytest.mark.parametrize(
    ("address", "status", "why"),
    [
        ("/rows/nobody", 404, "no row"),
        ("/tables/nothing", 404, "no finished table"),
        ("/tables/images?sort=clip", 400, "column"),
        ("/tables/images?page=0", 400, "page: expected a whole number"),
        ("/clusters/images", 404, "of type images"),
        ("/clusters/clusters/9", 404, "no cluster 9"),
        ("/clusters/clusters?order=evil", 400, "order: expected one of"),
        ("/duplicates/duplicates/9", 404, "no group 9"),
        ("/rejects/images/etc/passwd", 404, "no rejected row"),
        ("/map/map/rows?row=-1", 400, "row: expected"),
        ("/search?like=nobody", 400, "no such row"),
        ("/search?top=x", 400, "top: expected a whole number"),
        ("/nowhere", 404, "there is no page"),
    ],
)
def test_what_is_not_there_is_a_page_that_says_so(client: TestClient, address: str, status: int, why: str) -> None:
    answer = client.get(address)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert why in html.unescape(answer.text)


def test_first_bytes_of_a_rejected_file(client: TestClient) -> None:
    page = html.unescape(client.get("/rejects/images/" + urllib.parse.quote(f"rejected/{MARKUP}", safe="")).text)
    assert "00000000  3c 73 63 72 69 70 74 3e 61 6c 65 72 74 28 31 29  <script>alert(1)" in page
    assert "500 bytes in all" in page


def test_tables_are_sorted_and_paged(client: TestClient) -> None:
    page = client.get("/tables/map?sort=x&descending=1").text
    assert [
        int(x) for x in re.findall(r'<td class="n"><span class="name">(\d)</span></td>\s*<td class="n">', page)
    ] == [5 - n // 5 for n in range(ROWS)]


def test_the_confusion_matrix_leads_to_its_rows(client: TestClient) -> None:
    matrix = client.get("/labels/labels").text
    cells = re.findall(r'<td class="(?:hit|miss) s\d"><a href="([^"]*)"[^>]*>(\d+)</a>', matrix)
    assert sum(int(rows) for _, rows in cells) == ROWS
    for link, rows in cells:
        page = client.get(html.unescape(link)).text
        assert page.count('<li class="tile') == int(rows)


def test_the_map_as_arrays(client: TestClient) -> None:
    places = np.frombuffer(client.get("/api/map/points?table=map").content, "<f4").reshape(-1, 2)
    assert places.tolist() == [[n % 6, n // 6] for n in range(ROWS)]
    codes = np.frombuffer(client.get("/api/map/codes?table=map&column=cluster_id").content, "<u2")
    legend = client.get("/api/map/legend?table=map&column=cluster_id").json()
    assert [legend["values"][code]["value"] for code in codes] == [n % 2 for n in range(ROWS)]
    shades = np.frombuffer(client.get("/api/map/codes?table=map&column=distance").content, "<u2")
    legend = client.get("/api/map/legend?table=map&column=distance").json()
    assert np.allclose(
        legend["low"] + shades / (legend["shades"] - 1) * (legend["high"] - legend["low"]),
        np.arange(ROWS) / 10,
        atol=0.01,
    )
    tiles = client.get("/map/map/rows?row=3&row=1").text
    assert re.findall(r'class="view" href="/rows/([^"]*)"', tiles) == [
        IDS[3],
        urllib.parse.quote(IDS[1], safe="/").replace("'", "%27"),
    ]


@pytest.mark.parametrize("file_format", ["csv", "parquet", "manifest"])
def test_nothing_is_exported_as_a_file_without_rows(client: TestClient, file_format: str) -> None:
    answer = client.get(f"/api/export?where=cluster_id+%3D+99&format={file_format}")
    data = io.BytesIO(answer.content)
    frame = pl.read_csv(data) if file_format == "csv" else pl.read_parquet(data)
    assert (answer.status_code, len(frame), frame.columns[:1]) == (200, 0, ["image_id"])


def test_the_report_links_into_the_page_and_runs_no_script(client: TestClient) -> None:
    answer = client.get("/report")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    links = set(re.findall(r'href="(/(?:rows|clusters)/[^"]*)"', answer.text))
    assert len(links) > 2
    assert {client.get(html.unescape(link)).status_code for link in links} == {200}


def test_conditions_are_added_and_taken_away() -> None:
    where = toggled(toggled("", equals("kind", "it's")), equals("width", 5))
    assert where == "kind = 'it''s' and width = 5"
    assert has(where, "width = 5")
    assert toggled(where, "width = 5") == "kind = 'it''s'"
    assert toggled("a = 1 or b = 2", "c = 3") == "(a = 1 or b = 2) and c = 3"
    assert toggled("label = 'cat and dog'", "c = 3") == "(label = 'cat and dog') and c = 3"
    assert between("width", "5", "") == ["width >= 5"]
    assert between("day", "2026-01-31", "x") == ["day >= DATE '2026-01-31'", "day <= DATE 'x'"]
    assert contains("caption", "It's") == "strpos(lower(caption), 'it''s') > 0"
    assert [column_name(n) for n in ("images.label", "a b", "end", 'x"y')] == [
        "images.label",
        '"a b"',
        '"end"',
        '"x""y"',
    ]


def test_a_query_of_words_waits_for_the_model(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one of rows does not."""
    monkeypatch.setattr("clipray.serve.state.ServedRun.state", lambda *_: ("loading", None))
    page = client.get("/search?text=a+cat").text
    assert "The model is being loaded" in page
    assert '<noscript><meta http-equiv="refresh"' in page
    page = client.get("/search?like=" + urllib.parse.quote(IDS[0])).text
    assert "The model is being loaded" not in page
    assert '<li class="tile' in page


def test_of_several_runs_every_link_names_its_run(hostile_run: str, tmp_path: Path) -> None:
    shutil.copytree(hostile_run, tmp_path / "other")
    with TestClient(app(hostile_run, str(tmp_path / "other")), base_url="http://localhost") as client:
        for path in ("/clusters/clusters", "/search", "/map/map", "/rejects", "/duplicates/duplicates"):
            page = client.get(f"{path}?run=other").text
            links = [link for link in links_of(page, path) if link != path and not link.startswith("/static/")]
            assert len(links) > 10
            names = [urllib.parse.parse_qs(urllib.parse.urlsplit(link).query).get("run") for link in links]
            assert [name for name in names if name != ["other"]] == [["<i>run"]]  # where the runs are listed


def test_an_app_needs_a_run(tmp_path: object) -> None:
    with pytest.raises(JobError, match="expected the output folder of a run"):
        app(str(tmp_path))


def test_an_error_is_told_to_its_end(client: TestClient) -> None:
    """Which says what to do; a value of a table is cut."""
    page = client.get("/search?where=lable+%3D+1").text
    assert "did you mean" in page
    assert "\u202e" not in client.get("/nothing/%E2%80%AE").text
