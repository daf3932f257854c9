"""Images on web servers, as LAION lists them: what each server allows, and rejects by reason."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import Answer, Website, write_job

import clipray
from clipray.tables import read_table


@pytest.fixture
def site() -> Iterator[Website]:
    site = Website()
    yield site
    site.stop()


def jpeg(shade: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 255 - shade, 0)).save(sink, "JPEG")
    return sink.getvalue()


def test_rows_of_urls_become_a_table_and_rejects_by_reason(
    ray_here: object, site: Website, tmp_path: Path, tiny_model: str
) -> None:
    site.answers = {
        "/plain": [Answer(jpeg(1))],
        "/moved": [Answer(b"", 302, (("Location", "/plain"),))],
        "/busy": [Answer(b"", 429, (("Retry-After", "0"),)), Answer(jpeg(2))],
        "/other-bot": [Answer(jpeg(3), headers=(("X-Robots-Tag", "otherbot: noai"),))],
        "/noai": [Answer(jpeg(4), headers=(("X-Robots-Tag", "noai, noimageai"),))],
        "/unlisted": [Answer(jpeg(5), headers=(("X-Robots-Tag", "noindex"),))],
    }
    names = ["plain", "moved", "busy", "other-bot", "unlisted", "noai", "gone"]
    manifest, out = tmp_path / "laion.parquet", tmp_path / "out"
    uris = [f"{site.url}/{name}" for name in names]
    pq.write_table(pa.table({"image_id": names, "uri": uris, "TEXT": [f"a {name}" for name in names]}), manifest)
    fetching = {"user_agent": "mybot/1.0", "connections_per_host": 2, "disallowed_header_directives": ["noai"]}
    settings = {"keep": ["TEXT"], "batch_size": 8, "max_reject_rate": 0.5, **fetching}
    clipray.run(write_job(tmp_path / "job.yaml", manifest, tiny_model, **settings))
    assert sorted(read_table(str(out / "images"))["image_id"].to_pylist()) == sorted(names[:5])
    rejects = read_table(str(out / "rejects" / "images"))
    reasons = dict(zip(rejects["image_id"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
    assert reasons == {"noai": "robots_disallowed", "gone": "http_404"}
    assert site.requests.count("/busy") == 2
    assert site.user_agents == {"mybot/1.0"}
