"""The page of a run: made of tables that are written here, read back by an HTML parser, without Ray."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import clipray
from clipray import tables
from clipray.cli import app
from clipray.errors import ClipRayError, JobError, SchemaError
from clipray.inputs.manifest import open_manifest
from clipray.inputs.vector_column import open_vectors
from clipray.job import Column, Job, Report
from clipray.report.links import Links
from clipray.report.page import make_page
from clipray.report.retrieval import listed, ranked
from clipray.report.run_tables import finished_tables, open_run, open_table
from clipray.report.thumbnails import ImageSource, Thumbnails
from clipray.runner.report import write_report
from clipray.steps.base.step import StepContext
from clipray.steps.report import open_step
from clipray.storage.folder import Folder

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "'};</style><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "&lt;b&gt; & <!-- ",
    "\u202egnp.exe",
    "line\nbreak\tand\x07bell",
)
VOID = {"meta", "img", "br", "wbr", "path", "rect"}


class Reader(HTMLParser):
    """Tags, attributes and text of a page; whatever is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def write(
    out: Path, name: str, kind: str, rows: list[dict[str, Any]], schema: pa.Schema, **facts: Any
) -> None:  # fmt: skip
    """A finished table of a run, in two shards."""
    folder = Folder(str(out / name))
    data, stamp = pa.Table.from_pylist(rows, schema=schema), {"fingerprint": f"of-{name}"}
    half = len(rows) // 2
    shards = [
        tables.write_shard(folder, f"part-{n}.parquet", kind, part, stamp)
        for n, part in enumerate((data[:half], data[half:]))
    ]
    facts = {
        "inputs": {},
        "settings": {},
        "provenance": stamp,
        "finished_at": f"2026-01-01T00:00:{len(name):02d}+00:00",
    } | facts
    tables.commit(folder, kind, schema, shards, fingerprint=f"of-{name}", **facts)


def ids(names: tuple[str, ...] = ("image_id",)) -> list[pa.Field]:
    return [pa.field(name, pa.string(), nullable=False) for name in names]


def picture(path: Path, colour: tuple[int, int, int]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40), colour).save(path)
    return str(path)


VECTORS = {"table": "of-images", "column": "clip"}


def write_run(out: Path, names: list[str], uris: list[str | None], labels: list[str], *, clusters: int = 3) -> None:
    """Tables as the steps write them, of pictures with these names, places and known labels."""
    n, rng = len(names), np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    schema = tables.arrow_schema("images", {"clip": 4}, extra=[pa.field("label", pa.string())])
    rows = [
        {
            "image_id": name,
            "uri": uri,
            "height": 40,
            "width": 60,
            "clip": x[k].tolist(),
            "label": labels[k % len(labels)],
        }
        for k, (name, uri) in enumerate(zip(names, uris, strict=True))
    ]
    write(
        out,
        "images",
        "images",
        rows,
        schema,
        rejects=2,
        rejects_by_reason={"unreachable": 1, "empty": 1},
        seconds=2.0,
        rows_per_s=n / 2,
    )
    schema = pa.schema([*ids(), pa.field("clip", tables.vector_type(4), False)])
    write(
        out,
        "reduced",
        "reduced",
        [{"image_id": r["image_id"], "clip": r["clip"]} for r in rows],
        schema,
        inputs={"input": "images.clip"},
        settings={"input": VECTORS},
    )
    schema = pa.schema([*ids(), *tables.arrow_schema("clusters")])
    rows_of = [
        {"image_id": name, "cluster_id": k % clusters, "distance": (k * 7 % 11) / 10} for k, name in enumerate(names)
    ]
    write(
        out,
        "clusters",
        "clusters",
        rows_of,
        schema,
        inputs={"input": "reduced.clip"},
        settings={"input": {"table": "of-reduced", "column": "clip"}},
    )
    sizes = Counter(row["cluster_id"] for row in rows_of)
    schema = tables.arrow_schema("centroids", {"clip": 4})
    write(
        out,
        "clusters_centroids",
        "centroids",
        [
            {"cluster_id": k, "size": sizes[k], "inertia": 1.0, "nearest_id": None, "clip": [0.0] * 4}
            for k in range(clusters)
        ],
        schema,
    )
    schema = pa.schema([*ids(), *tables.arrow_schema("labels")])
    given = [
        {
            "image_id": name,
            "style": style,
            "label": labels[k * 3 % len(labels)],
            "probability": 0.5,
            "margin": 0.1,
            "top": [],
        }
        for style in ("plain", "other")
        for k, name in enumerate(names)
    ]
    write(
        out,
        "labels",
        "labels",
        given,
        schema,
        summary={"styles": {"plain": 3, "other": 3}},
        inputs={"input": "images.clip"},
        settings={"input": VECTORS},
    )


def write_duplicates(out: Path, groups: dict[int, list[str]]) -> None:
    """Groups of rows, of each the first one kept, and the others less and less like it."""
    schema = pa.schema([*ids(), *tables.arrow_schema("duplicates")])
    rows = [
        {"image_id": name, "group_id": group, "cluster_id": 0, "keeper_id": names[0], "kept": n == 0,
         "similarity": 1 - n / 100, "nearest": 0.99}
        for group, names in groups.items() for n, name in enumerate(names)
    ]  # fmt: skip
    write(out, "duplicates", "duplicates", rows[::-1], schema, settings={"similarity": 0.95})


def write_map(out: Path, names: list[str], method: str) -> None:
    schema = pa.schema([*ids(), *tables.arrow_schema("map")])
    rows = [{"image_id": name, "x": n, "y": n % 3, "neighbors": None} for n, name in enumerate(names)]
    summary = {"method": method, **({"first_variance_ratios": [0.5, 0.25]} if method == "pca" else {})}
    write(out, "map", "map", rows, schema, inputs={"input": "images.clip"}, summary=summary)


def page_of(out: Path) -> str:
    return Path(write_report(str(out))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose every text is out to break the page, and its page."""
    home = tmp_path_factory.mktemp("hostile")
    out = home / "out"
    good = picture(home / "a.png", (200, 30, 30))
    (home / "torn.jpg").write_bytes(b"\xff\xd8 not a picture")
    uris = [
        good,
        str(home / "gone.jpg"),
        str(home / "torn.jpg"),
        "http://127.0.0.1:9/a.jpg",
        "nowhere://b/a.jpg",
        None,
        good,
    ]
    write_run(out, list(HOSTILE), uris, list(HOSTILE))
    rejects = [
        {"image_id": text, "uri": f"/photos/{text}", "stage": "fetch", "reason": reason, "message": text * 200}
        for text, reason in zip(HOSTILE, ("unreachable", "empty"))
    ]  # fmt: skip
    write(out / "rejects", "images", "rejects", rejects, tables.rejects_schema("image_id", "uri"))
    schema = tables.arrow_schema("confusion")
    pairs = [
        {"data_set": HOSTILE[0], "style": HOSTILE[1], "label": a, "predicted": b, "n": 3}
        for a in HOSTILE for b in (*HOSTILE[:2], None)
    ]  # fmt: skip
    write(out, "label_figures_confusion", "confusion", pairs, schema)
    figure = {"data_set": HOSTILE[0], "style": HOSTILE[1], "metric": "top1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 7,
              "baseline": HOSTILE[2], "difference": -0.25, "difference_low": -0.3, "difference_high": 0.0}  # fmt: skip
    write(out, "label_figures", "label_figures", [figure], tables.arrow_schema("label_figures"))
    schema = pa.schema([*tables.arrow_schema("neighbours"), *ids()])
    hits = [{"query_id": HOSTILE[0], "rank": n + 1, "score": 0.5, "image_id": name} for n, name in enumerate(HOSTILE)]
    write(
        out,
        "neighbours",
        "neighbours",
        hits,
        schema,
        inputs={"input": "images.clip", "rows": 1},
        settings={"queries": VECTORS},
    )
    write_duplicates(out, {0: list(HOSTILE[:3]), 1: list(HOSTILE[3:5])})
    write_map(out, list(HOSTILE), "umap")
    (out / "events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "event": "run_started", "job": "<b>bold</b>"}\n', encoding="utf-8"
    )
    return out, page_of(out)


def test_nothing_of_the_data_is_markup(hostile: tuple[Path, str]) -> None:
    read = Reader(hostile[1])
    assert not read.tags.keys() & {"script", "iframe", "object", "link", "base", "form", "input"}
    assert read.tags["title"] == read.tags["style"] == read.tags["h1"] == 1
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    for text in HOSTILE[:5]:
        assert text in read.text, text
    assert "49" not in re.findall(r"7 \* 7[^<]*", read.text)
    assert "<b>bold</b>" in read.text
    assert "\u202e" not in hostile[1]
    assert "\x07" not in hostile[1]


def test_the_page_needs_nothing_beside_itself(hostile: tuple[Path, str]) -> None:
    read = Reader(hostile[1])
    for tag, name, value in read.attributes:
        if name in ("src", "href", "srcset", "poster", "action", "xlink:href", "data"):
            assert value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:80])
    style = hostile[1].split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (v for _, name, v in read.attributes if name == "content" and "default-src" in v)
    assert "default-src 'none'" in policy


def test_pictures_that_cannot_be_had_are_placeholders(hostile: tuple[Path, str]) -> None:
    text = Reader(hostile[1]).text
    for reason in ("cannot be read", "undecodable", "scheme not allowed", "no image is known"):
        assert reason in text


def test_the_table_beside_the_page_says_where_tables_are_shown(hostile: tuple[Path, str]) -> None:
    rows = {row["table"]: row for row in tables.read_table(str(hostile[0] / "report")).to_pylist()}
    assert rows["clusters"]["sections"] == "What ran, Map, Clusters"
    assert rows["images"]["rejects"] == 2
    assert rows["images"]["sections"].endswith("Rejected rows")
    record = tables.read_record(Folder(str(hostile[0] / "report")))
    assert record is not None
    assert record.summary["left_out"] == ["Metrics"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250), (120, 120, 120)]
    names = [f"p{n}" for n in range(len(colours))]
    uris: list[str | None] = [picture(tmp_path / f"{n}.png", colour) for n, colour in zip(names, colours, strict=True)]
    write_run(out, names, uris, ["red", "green", "blue"])
    return out


def tiles(page: str) -> Iterator[tuple[str, Image.Image]]:
    """Name and pixels of each picture of a page."""
    for data, name in re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]*)"', page):
        yield name, Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def test_sheets_hold_the_nearest_pictures_in_order(small: Path) -> None:
    page = page_of(small)
    sheets = page.split('id="clusters"')[1].split("</section>")[0].split('class="sheet"')[1:]
    found = {int(re.findall(r"Cluster (\d)", sheet)[0]): [name for name, _ in tiles(sheet)] for sheet in sheets}
    # distances are (7 k mod 11) / 10: 0, .7, .3, 1, .6, .2, .9 of p0 … p6
    assert found == {0: ["p0", "p6", "p3"], 1: ["p4", "p1"], 2: ["p5", "p2"]}
    assert list(found) == [0, 1, 2]  # the largest first
    colours = {name: image.getpixel((30, 20)) for name, image in tiles(page)}
    assert colours["p0"] == pytest.approx((250, 0, 0), abs=12)
    assert colours["p5"] == pytest.approx((250, 0, 250), abs=12)
    said = " ".join(re.sub(r"<[^>]+>", "", sheets[0].split("<h4>")[1].split("</h4>")[0]).split())
    assert said == "Cluster 0 3 rows, 42.9 % · red 3 of 3 labelled"


def section(page: str, name: str) -> str:
    return page.split(f'<section id="{name}">')[1].split("</section>", maxsplit=1)[0]


def test_groups_of_duplicates_stand_side_by_side_the_kept_one_first(small: Path) -> None:
    write_duplicates(small, {0: ["p1", "p0"], 1: ["p5", "p2", "p4", "p3"]})
    shown = section(page_of(small), "duplicates")
    sheets = [[name for name, _ in tiles(sheet)] for sheet in shown.split('class="sheet"')[1:]]
    assert sheets == [["p5", "p2", "p4", "p3"], ["p1", "p0"]]
    assert re.findall(r'class="tile (\w*) " title="(p\d)[^:]*: ([\w.]+)"', shown) == [
        ("hit", "p5", "kept"), ("", "p2", "0.990"), ("", "p4", "0.980"), ("", "p3", "0.970"), ("hit", "p1", "kept"), ("", "p0", "0.990"),
    ]  # fmt: skip
    assert "6 rows in 2 groups, of a cosine of 0.95 and more; 4 to drop" in Reader(shown).text


@pytest.mark.parametrize(("method", "axis"), [("umap", "UMAP 1"), ("pca", "component 1, 50.0% of the variance")])
def test_a_map_is_shown_in_place_of_components(small: Path, method: str, axis: str) -> None:
    assert "Across: component 1; upwards: component 2." in section(page_of(small), "plot")
    write_map(small, [f"p{n}" for n in range(7)], method)
    shown = section(page_of(small), "plot")
    assert f"all 7 rows of map. Across: {axis}; upwards:" in shown
    assert "by cluster, clusters" in shown
    assert len(re.findall(r"M\d+ \d+h0", shown)) == 2 * 7
    assert ('class="zero"' in shown) == (method == "pca")


def test_images_and_clusters_link_into_the_served_page_only_from_there(small: Path) -> None:
    run = open_run(Folder(str(small)), finished_tables(Folder(str(small))), "label")
    assert "<a href=" not in section(make_page(run, "a", Report()).html, "clusters")
    linked = section(make_page(run, "a", Report(), Links("/r")).html, "clusters")
    assert re.findall('<a href="([^"]+)">', linked)[:3] == ["/r/clusters/clusters/0", "/r/rows/p0", "/r/rows/p6"]
    assert Links().row('a/"b?.png') == "/rows/a%2F%22b%3F.png"


def test_labels_are_counted_and_held_against_what_is_known(small: Path) -> None:
    page = page_of(small).split('id="labels"')[1].split("</section>")[0]
    rows = re.findall(
        r"<b>(\w+)</b>\s*<span class=\"bar\">.*?<b>(\d+)</b> rows</small><small><b>(\d+)</b> known", page, re.S
    )
    assert rows == [("red", "7", "3")]  # k * 3 mod 3 is 0: all were given the first label
    assert page.count("✓") - 1 == page.count('"tile  right"')
    verdicts = dict(re.findall(r'class="tile  (right|wrong)" title="(p\d)', page))
    right = {
        name for verdict, name in re.findall(r'class="tile  (right|wrong)" title="(p\d)', page) if verdict == "right"
    }
    assert right <= {"p0", "p3", "p6"}
    assert set(verdicts) == {"right", "wrong"}


def test_a_page_is_made_again_when_what_it_shows_has_changed(small: Path) -> None:
    def state(**settings: Any) -> str:
        job = Job(name="out", output=str(small), steps=[{"report": settings}])
        return open_step(Report(**settings), StepContext(job, Folder(str(small)), lambda: None)).inspect().status

    path = Path(write_report(str(small)))
    stamp = path.stat().st_mtime_ns
    assert write_report(str(small)) == str(path)
    assert path.stat().st_mtime_ns == stamp
    assert state(of=["images", "clusters"]) == "stale"
    job = Job(name="out", output=str(small), steps=[{"report": {"of": ["images", "clusters"]}}])
    assert clipray.run(job)[0].note == ""  # of other tables: made anew, though it was finished
    assert clipray.run(job)[0].note == "was finished already"
    record = tables.read_record(Folder(str(small / "images")))
    assert record is not None
    tables.write_record(Folder(str(small / "images")), replace(record, rejects=77))
    assert state(of=["images", "clusters"]) == "partial"
    assert "77" in Reader(Path(clipray.run(job)[0].page).read_text(encoding="utf-8")).text
    assert state(of=["images", "clusters"]) == "finished"
    assert state(of=["images", "clusters"], title="Another") == "stale"
    path.write_text("torn", encoding="utf-8")
    assert state(of=["images", "clusters"]) == "partial"
    assert clipray.run(job)[0].note == ""
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    (small / "report" / tables.RECORD).unlink()  # killed before the end
    assert state(of=["images", "clusters"]) == "partial"


def test_a_table_that_is_named_must_be_there(small: Path) -> None:
    job = Job(name="x", output=str(small), steps=[{"report": {"of": ["images", "klusters"]}}])
    with pytest.raises(SchemaError, match="report: klusters: no finished table in"):
        clipray.run(job)
    with pytest.raises(SchemaError, match="no step before it writes a table"):
        clipray.run(Job(name="x", output=str(small), steps=[{"report": {}}]))


def test_the_command_says_where_the_page_is(small: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(small), "--title", "Mine"])
    assert done.stdout.replace("\n", "") == f"report: {small}/report/report.html"
    assert "<title>Mine</title>" in (small / "report" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(JobError, match="no run there"):
        write_report(str(tmp_path / "nothing"))


@pytest.mark.parametrize("of_hugging_face", [False, True])
def test_pictures_in_the_manifest_itself_are_shown(tmp_path: Path, of_hugging_face: bool) -> None:
    sink = io.BytesIO()
    Image.new("RGB", (40, 40), (10, 200, 10)).save(sink, "PNG")
    path, data = tmp_path / "m.parquet", [sink.getvalue(), b"torn"]
    struct = pa.array([{"bytes": one, "path": "p.png"} for one in data])
    columns = {"image": struct} if of_hugging_face else {"image_id": ["p0", "p1"], "bytes": data}
    pq.write_table(pa.table(columns), path, row_group_size=1)
    ids = ["m/0", "m/1"] if of_hugging_face else ["p0", "p1"]
    schema = tables.arrow_schema("images", {"clip": 2}, extra=[pa.field("label", pa.string())])
    rows = [
        {"image_id": name, "uri": None, "height": 40, "width": 40, "clip": [1.0, 0.0], "label": "a"} for name in ids
    ]
    inputs = {"manifest": [str(path)], "layout": open_manifest(str(path)).layout.facts}
    write(tmp_path / "out", "images", "images", rows, schema, inputs=inputs)
    page = page_of(tmp_path / "out")
    ((name, image),) = tiles(page)
    assert name == ids[0]
    assert image.getpixel((20, 20)) == pytest.approx((10, 200, 10), abs=12)
    assert "not an image" in page


def test_a_page_of_any_run_is_small(tmp_path: Path) -> None:
    """Many rows, clusters and labels, all with long names; pictures of noise, the largest there are."""
    rng, noise = np.random.default_rng(0), []
    for n in range(24):
        noise.append(str(tmp_path / f"{n}.png"))
        Image.fromarray(rng.integers(0, 255, (100, 100, 3), np.uint8)).save(noise[-1])
    names = [f"{'x' * 300}-{k:08d}" for k in range(9_000)]
    labels = [f"{k:05d} {'a very long label ' * 40}" for k in range(1_000)]
    out = tmp_path / "out"
    write_run(out, names, [noise[k % 24] for k in range(len(names))], labels, clusters=60)
    pairs = [
        {"data_set": "all", "style": "plain", "label": labels[a], "predicted": labels[(a * 7 + b) % 300], "n": 1}
        for a in range(300) for b in range(30)
    ]  # fmt: skip
    write(out, "label_figures_confusion", "confusion", pairs, tables.arrow_schema("confusion"))
    figures = [
        {"data_set": f"set {n} {'y' * 500}", "style": "plain", "metric": "top1", "value": 0.5, "low": 0.4, "high": 0.6, "n": 7,
         "baseline": None, "difference": None, "difference_low": None, "difference_high": None}
        for n in range(500)
    ]  # fmt: skip
    write(out, "label_figures", "label_figures", figures, tables.arrow_schema("label_figures"))
    page = page_of(out)
    assert 500_000 < len(page.encode()) < 2_000_000
    assert len(list(tiles(page))) == 40 * 10 + 16 * 6


def test_a_thumbnail_fits_into_its_bytes() -> None:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (400, 200, 3), np.uint8)
    Image.fromarray(noise).save(sink, "PNG")
    source = ImageSource("x", None, (200, 400))
    for most in (20_000, 3_000, 700):
        data, missing = Thumbnails(128, most).of_bytes(sink.getvalue(), source)
        assert data is not None
        assert missing == ""
        assert len(data) <= most
    boxed, _ = Thumbnails(100, 50_000).of_bytes(sink.getvalue(), replace(source, box=(100.0, 200.0, 200.0, 400.0)))
    assert boxed is not None
    image = np.asarray(Image.open(io.BytesIO(boxed)).convert("RGB")).astype(int)
    assert image.shape == (100, 50, 3)
    edge, inside = image[55:95, 25:27].mean(axis=(0, 1)), image[60:90, 32:45].mean(axis=(0, 1))
    assert edge[0] > inside[0] + 40  # orange along the box's left side


def test_rankings_are_those_of_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 8)).astype(np.float32)
    names = [f"r{n:03d}" for n in range(500)]
    vector = tables.vector_array(x, tables.vector_type(8))
    pq.write_table(pa.table({"image_id": names, "v": vector}), tmp_path / "v.parquet", row_group_size=90)
    source = open_vectors(Column(path=str(tmp_path / "v.parquet"), column="v"), Folder(str(tmp_path)))
    for distance, without_own in (("cosine", True), ("l2", False)):
        found = ranked(source, {"r007": x[7], "r100": x[100]}, 5, distance=distance, without_own=without_own)
        for name, q in (("r007", x[7]), ("r100", x[100])):
            cosine = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
            scores = cosine if distance == "cosine" else -((x - q) ** 2).sum(axis=1)
            order = [names[n] for n in np.argsort(-scores) if not (without_own and names[n] == name)][:5]
            assert [row["image_id"] for row, _ in found[name]] == order
            assert [score for _, score in found[name]] == pytest.approx(
                sorted(scores[[names.index(o) for o in order]], reverse=True), abs=1e-5
            )


def test_lists_leave_out_the_query_itself(tmp_path: Path) -> None:
    schema = pa.schema([*tables.arrow_schema("neighbours"), *ids()])
    rows = [{"query_id": "a", "rank": n + 1, "score": 1 - n / 10, "image_id": name} for n, name in enumerate("abcd")]
    write(tmp_path, "n", "neighbours", rows[::-1], schema)
    table = open_table("n", Folder(str(tmp_path / "n")))
    assert table is not None
    assert listed(table, ["a", "z"], 2) == {
        "a": [({"image_id": "b"}, pytest.approx(0.9)), ({"image_id": "c"}, pytest.approx(0.8))],
        "z": [],
    }


def test_errors_are_ours(small: Path) -> None:
    """A shard that is gone: one line that says so."""
    (small / "clusters" / "part-0.parquet").unlink()
    with pytest.raises(ClipRayError, match=r"part-0\.parquet is missing"):
        write_report(str(small))


def test_a_column_of_labels_that_is_named_must_be_there(small: Path) -> None:
    job = Job(name="x", output=str(small), steps=[{"report": {"of": ["images"], "label": "images.label"}}])
    with pytest.raises(
        SchemaError, match=r"no table of images has a column 'images.label' of labels; columns: clip, height, "
    ):
        clipray.run(job)


@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 1), (3, 4)])
def test_the_smallest_runs_have_a_page(tmp_path: Path, n: int, width: int) -> None:
    """One row, one component, all points in one place, a point that is not finite."""
    rows = [{"image_id": f"p{k}", "v": [float("nan") if k == 2 else 1.0] * width} for k in range(n)]
    schema = pa.schema([*ids(), pa.field("v", tables.vector_type(width), False)])
    write(tmp_path / "out", "reduced", "reduced", rows, schema)
    dots = re.findall(r' d="((?:M\d+ \d+h0)+)"', page_of(tmp_path / "out"))
    assert "".join(dots).count("M") in range(1, n + 1)


def test_regions_are_shown_in_their_pictures_and_texts_as_words(tmp_path: Path) -> None:
    out = tmp_path / "out"
    uri = picture(tmp_path / "a.png", (20, 20, 20))
    schema = tables.arrow_schema("images", {"clip": 2})
    write(
        out, "images", "images", [{"image_id": "a", "uri": uri, "height": 40, "width": 60, "clip": [1.0, 0.0]}], schema
    )
    boxes = {"a#g0": [0.0, 0.0, 30.0, 40.0], "a#g1": [30.0, 0.0, 60.0, 40.0]}
    schema = tables.arrow_schema("regions", {"clip": 2})
    rows = [
        {"image_id": "a", "region_id": name, "box_xyxy": box, "scale": 1, "clipped": False, "clip": [0.0, 1.0]}
        for name, box in boxes.items()
    ]
    write(out, "regions", "regions", rows, schema)
    members = [
        {"image_id": "a", "region_id": name, "cluster_id": 0, "distance": float(n)} for n, name in enumerate(boxes)
    ]
    write(
        out,
        "clusters",
        "clusters",
        members,
        pa.schema([*ids(("image_id", "region_id")), *tables.arrow_schema("clusters")]),
    )
    centroid = {"cluster_id": 0, "size": 2, "inertia": 0.0, "nearest_id": None, "clip": [0.0, 0.0]}
    write(out, "clusters_centroids", "centroids", [centroid], tables.arrow_schema("centroids", {"clip": 2}))
    schema = tables.arrow_schema("texts", {"embedding": 2})
    write(
        out,
        "texts",
        "texts",
        [{"text_id": "t", "text": "a hen & an egg", "truncated": False, "embedding": [1.0, 0.0], "image_id": None}],
        schema,
    )
    schema = pa.schema([*tables.arrow_schema("neighbours"), *ids()])
    write(out, "found", "neighbours", [{"query_id": "t", "rank": 1, "score": 0.5, "image_id": "a"}], schema,
          inputs={"input": "texts.embedding", "rows": 1})  # fmt: skip
    page = page_of(out)
    shown = list(tiles(page))
    assert [name for name, _ in shown] == ["a#g0", "a#g1", "a"]
    middle = [[image.getpixel((x, 25))[0] > 100 for x in (0, image.width - 1)] for _, image in shown]
    assert middle == [[True, False], [False, True], [False, False]]  # the orange of a box, on the side where it is
    assert '<div class="text">a hen &amp; an egg</div>' in page


def test_a_run_in_an_object_store_has_its_page_there(small: Path, s3: str) -> None:
    """Its pictures too, but for one that is not there."""
    fs, shelf = fsspec.filesystem("s3"), f"{s3}/a-page"
    images = tables.read_table(str(small / "images"))
    for name, uri in zip(images["image_id"].to_pylist(), images["uri"].to_pylist(), strict=True):
        if name != "p1":
            fs.put(uri, f"{shelf}/{name}.png")
    rows = [{**row, "uri": f"{shelf}/{row['image_id']}.png"} for row in images.to_pylist()]
    write(small, "images", "images", rows, images.schema.remove_metadata())
    fs.put(str(small), f"{shelf}/out", recursive=True)
    where = write_report(f"{shelf}/out")
    assert where == f"{shelf}/out/report/report.html"
    page = fs.cat_file(where).decode()
    assert {name for name, _ in tiles(page)} == {"p0", "p2", "p3", "p4", "p5", "p6"}
    assert page.count("cannot be read") >= 1
