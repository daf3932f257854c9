"""Servers that have a bad minute: no good row is lost, and what still failed comes again by itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from support import Answer, Website

import clipray
from clipray.errors import RejectRateError
from clipray.inputs.committed_rows import CommittedRows, check_committed
from clipray.storage.events import read_events
from clipray.storage.folder import Folder
from clipray.tables import read_record, read_table

ROWS = 40
GONE, AWAY = "gone", "away"


@pytest.fixture
def site() -> Iterator[Website]:
    site = Website()
    for n in range(ROWS):
        sink = io.BytesIO()
        Image.new("RGB", (64, 64), (n * 6, 255 - n * 6, n)).save(sink, "JPEG")
        site.answers[f"/{n}.jpg"] = [Answer(sink.getvalue())]
    site.answers[f"/{AWAY}.jpg"] = [Answer(b"", 503, (("Retry-After", "3600"),))]  # nobody waits for it within a pass
    yield site
    site.stop()


def flaky(number: int) -> dict[str, Any]:
    """Every third request meets a 503, every tenth body is cut, every twentieth drips."""
    if number % 3 == 0:
        return {"status": 503}
    return {"drip_s": 60} if number % 20 == 0 else {"cut": True} if number % 10 == 0 else {}


@pytest.fixture
def job(site: Website, tmp_path: Path, tiny_model: str) -> Callable[..., str]:
    def write(rows: list[str], **settings: Any) -> str:
        uris = [f"{site.url}/{row}.jpg" for row in rows]
        pq.write_table(pa.table({"image_id": rows, "uri": uris}), tmp_path / "m.parquet")
        images = {"manifest": str(tmp_path / "m.parquet"), "fetch_timeout_s": 2, "batch_size": 8, **settings}
        steps = [{"embed_images": images}, {"reduce": {"input": "images.clip", "components": 2}}]
        values = {"output": str(tmp_path / "out"), "model": {"name": tiny_model, "precision": "fp32"}, "steps": steps}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / "job.yaml")

    return write


def rejects(out: Path) -> dict[str, str]:
    table = read_table(str(out / "rejects" / "images"))
    return dict(zip(table["image_id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def notes(job: str, **options: Any) -> list[str]:
    return [report.note for report in clipray.run(job, **options)][:2]


def test_no_good_row_is_lost_and_what_is_away_comes_when_it_is_back(
    ray_here: object, site: Website, job: Callable[..., str], tmp_path: Path
) -> None:
    out, path = tmp_path / "out", job([*map(str, range(ROWS)), GONE, AWAY], max_reject_rate=0.1)
    site.bad = flaky
    assert [report.rows for report in clipray.run(path)[:2]] == [ROWS, ROWS]
    assert rejects(out) == {GONE: "http_404", AWAY: "http_503"}
    assert sorted(read_table(str(out / "images"))["image_id"].to_pylist()) == sorted(map(str, range(ROWS)))
    assert [e["rows"] for e in read_events(Folder(str(out))) if e["event"] == "rejects_taken_back"]
    site.bad = lambda _: {}
    planned = clipray.plan(path)[0]
    assert [report.note for report in planned] == [
        "1 rows rejected for a temporary reason are tried again",
        "nothing to do",
    ]
    asked = len(site.requests)
    assert notes(path, retry=False) == ["was finished already"] * 2
    assert len(site.requests) == asked
    before = (out / "reduced" / "_table.json").read_bytes()
    assert notes(path)[1] == "was finished already"
    assert set(site.requests[asked:]) == {f"/{AWAY}.jpg"}
    assert (out / "reduced" / "_table.json").read_bytes() == before
    site.answers[f"/{AWAY}.jpg"] = site.answers["/7.jpg"]
    assert [report.rows for report in clipray.run(path)[:2]] == [ROWS + 1] * 2
    assert rejects(out) == {GONE: "http_404"}
    assert notes(path) == ["was finished already"] * 2


def test_too_many_rejects_are_told_after_the_last_pass_and_tried_again(
    ray_here: object, site: Website, job: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound of one rejected row would end the run before the last pass, did passing ones count."""
    monkeypatch.setattr("clipray.steps.base.encode_run.STOP_EARLY_REJECTS", 1)
    path = job([AWAY, "1", "2"], max_reject_rate=0.1)
    with pytest.raises(
        RejectRateError, match=r"1 http_503.*the same run again tries 1 of them, whose reasons may pass"
    ):
        clipray.run(path)
    assert site.requests.count(f"/{AWAY}.jpg") >= 2  # in the first pass and in the last
    site.answers[f"/{AWAY}.jpg"] = site.answers["/7.jpg"]
    clipray.run(path)
    record = read_record(Folder(str(tmp_path / "out" / "images")))
    assert record is not None
    assert (record.rows, record.rejects) == (3, 0)


@pytest.mark.parametrize(("rows", "passes"), [(["1", "2", "3"], 1), (["1", "2", "3", AWAY], 2)])
def test_what_is_on_disk_is_counted_before_each_pass_and_once_after_the_last(
    ray_here: object, job: Callable[..., str], rows: list[str], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def counting(*args: Any, **options: Any) -> CommittedRows:
        committed = check_committed(*args, **options)
        counted.append(committed.rows)
        return committed

    monkeypatch.setattr("clipray.steps.base.encode_step.check_committed", counting)
    clipray.run(job(rows, max_reject_rate=0.9))
    assert counted == [0] + [3] * passes
