"""docs/inputs.md, followed: each source goes from the files that people have to a finished table in one command."""

from __future__ import annotations

import io
import json
import re
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import DOCS, Answer, Website, clipray_here, draw_pictures, follow

from clipray.tables import read_table

pytestmark = pytest.mark.usefixtures("ray_here")
PAGE = (DOCS / "inputs.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
COUNT = 6
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small pictures, all different."""
    folder = tmp_path_factory.mktemp("sources") / "photos"
    draw_pictures(folder, COUNT)
    return sorted(folder.rglob("*.jpg"))


@pytest.fixture(scope="module")
def expected(photos: list[Path], ray_here: object) -> np.ndarray:
    """(COUNT, d): the vectors of the photos, from the page's first command."""
    home = photos[0].parents[2]
    folder = SECTIONS["Folders"].replace("clipray embed birds", "#")
    follow(folder, home)
    table = read_table(str(home / "runs/photos/images")).sort_by("image_id")
    assert [home / "photos" / name for name in table["image_id"].to_pylist()] == photos
    return np.stack(table["clip"].to_numpy())


@pytest.fixture
def site(photos: list[Path]) -> Iterator[Website]:
    site = Website()
    for n, photo in enumerate(photos):
        site.answers[f"/{n}.jpg"] = [Answer(photo.read_bytes())]
    yield site
    site.stop()


def write(path: Path, columns: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def image_folder(home: Path, photos: list[Path], _: Website) -> None:
    for n, photo in enumerate(photos):
        (home / "birds").mkdir(exist_ok=True)
        (home / f"birds/{n}.jpg").write_bytes(photo.read_bytes())
    (home / "photos").symlink_to(home / "birds")
    lines = [json.dumps({"file_name": f"{n}.jpg", "label": f"bird {n}"}) for n in range(COUNT)]
    (home / "birds/metadata.jsonl").write_text("\n".join(lines))


def lists(home: Path, photos: list[Path], _: Website) -> None:
    csv = [f"{n},{photo},{n}.5" for n, photo in enumerate(photos)]
    (home / "list.csv").write_text("\n".join(["id,path,price", *csv]))
    jsonl = [json.dumps({"key": f"{n}", "image": str(photo)}) for n, photo in enumerate(photos)]
    (home / "list.jsonl").write_text("\n".join(jsonl))


def coco(home: Path, photos: list[Path], _: Website) -> None:
    images = [{"id": n, "file_name": str(photo)} for n, photo in enumerate(photos)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [1, 2, 3, 4]} for n in range(COUNT)]
    categories = [{"id": 1, "name": "disc"}]
    (home / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))


def hugging_face(home: Path, photos: list[Path], _: Website) -> None:
    images = [{"bytes": photo.read_bytes(), "path": f"{n}.jpg"} for n, photo in enumerate(photos)]
    images[-1] = {"bytes": None, "path": str(photos[-1])}
    write(home / "beans/train-0.parquet", {"image": pa.array(images, IMAGE), "labels": list(range(COUNT))})


def urls(home: Path, _: list[Path], site: Website) -> None:
    addresses = [f"{site.url}/{n}.jpg" for n in range(COUNT)]
    write(home / "laion.parquet", {"URL": addresses, "TEXT": [f"disc {n}" for n in range(COUNT)]})


def tar_of(path: Path, photos: list[Path], first: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n, photo in enumerate(photos, first):
            tar.add(photo, f"{n:09d}.jpg")
            for extension, text in (("txt", f"disc {n}"), ("json", f'{{"n": {n}}}')):
                info = tarfile.TarInfo(f"{n:09d}.{extension}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))


def webdataset(home: Path, photos: list[Path], _: Website) -> None:
    tar_of(home / "shards/00000.tar", photos[:2])
    tar_of(home / "shards/00001.tar", photos[2:], 2)


def img2dataset(home: Path, photos: list[Path], _: Website) -> None:
    columns = {
        "key": [f"{n:09d}" for n in range(COUNT + 2)],
        "url": [f"http://127.0.0.1:9/{n}" for n in range(COUNT + 2)],
        "caption": [f"disc {n}" for n in range(COUNT + 2)],
        "status": ["success"] * COUNT + ["failed_to_download", "failed_to_resize"],
        "error_message": [None] * COUNT + ["HTTP Error 404: Not Found", "not an image"],
        "jpg": pa.array([*(photo.read_bytes() for photo in photos), None, None], pa.binary()),
    }
    write(home / "downloaded/00000.parquet", columns)
    (home / "downloaded/00000_stats.json").write_text("{}")
    tar_of(home / "crawled/00000.tar", photos)
    write(home / "crawled/00000.parquet", {name: column for name, column in columns.items() if name != "jpg"})
    (home / "crawled/00000_stats.json").write_text("{}")


def other_parquet(home: Path, photos: list[Path], _: Website) -> None:
    for year, rows in ((2023, slice(0, 2)), (2024, slice(2, COUNT))):
        numbers = range(COUNT)[rows]
        meta = pa.array([{"species": f"bird {n}"} for n in numbers])
        ids = pa.array([uuid.UUID(int=n).bytes for n in numbers], pa.uuid())
        files = [str(photo) for photo in photos[rows]]
        write(home / f"years/year={year}/0.parquet", {"number": ids, "file": files, "meta": meta})


NUMBERS = [str(n) for n in range(COUNT)]
UUIDS = [str(uuid.UUID(int=n)) for n in range(COUNT)]
IN_TARS = [f"{int(n > 1):05d}/{n:09d}" for n in range(COUNT)]
DISCS = [f"disc {n}" for n in range(COUNT)]
YEARS = ["2023"] * 2 + ["2024"] * 4


@pytest.mark.parametrize(
    ("section", "build", "tables"),
    [
        (
            "Folders",
            image_folder,
            {"birds": ([f"{n}.jpg" for n in NUMBERS], {"label": [f"bird {n}" for n in NUMBERS]})},
        ),
        ("Lists", lists, {"csv": (NUMBERS, {"price": [n + 0.5 for n in range(COUNT)]}), "jsonl": (NUMBERS, {})}),
        ("COCO", coco, {"coco": (NUMBERS, {"box_labels": [["disc"]] * COUNT})}),
        (
            "WebDataset",
            webdataset,
            {
                "shards": (IN_TARS, {"txt": DISCS}),
                "tars": (IN_TARS, {"txt": DISCS, "json": [f'{{"n": {n}}}' for n in NUMBERS]}),
            },
        ),
        ("Hugging Face", hugging_face, {"beans": ([f"train-0/{n}" for n in NUMBERS], {"labels": list(range(COUNT))})}),
        (
            "Parquet of URLs",
            urls,
            {"laion": ([f"laion/{n}" for n in NUMBERS], {"TEXT": [f"disc {n}" for n in NUMBERS]})},
        ),
        (
            "img2dataset",
            img2dataset,
            {
                "downloaded": ([f"{n:09d}" for n in range(COUNT)], {}),
                "crawled": ([f"00000/{n:09d}" for n in range(COUNT)], {"txt": DISCS}),
            },
        ),
        (
            "Parquet",
            other_parquet,
            {
                "years": (UUIDS, {"year": YEARS}),
                "named": (UUIDS, {"year": YEARS, "label": [f"bird {n}" for n in NUMBERS]}),
            },
        ),
    ],
)
def test_a_source_becomes_a_table_in_one_command(
    section: str,
    build: Callable[[Path, list[Path], Website], None],
    tables: dict[str, tuple[list[str], dict[str, list[Any]]]],
    photos: list[Path],
    expected: np.ndarray,
    site: Website,
    tmp_path: Path,
) -> None:
    build(tmp_path, photos, site)
    follow(SECTIONS[section], tmp_path)
    for out, (ids, columns) in tables.items():
        table = read_table(str(tmp_path / f"runs/{out}/images")).sort_by("image_id")
        assert table["image_id"].to_pylist() == ids
        for name, values in columns.items():
            assert table[name].to_pylist() == values
        assert np.abs(np.stack(table["clip"].to_numpy()) - expected).max() <= 1e-6
    if section == "img2dataset":
        rejects = read_table(str(tmp_path / "runs/downloaded/rejects/images"))
        assert rejects["reason"].to_pylist() == ["not_downloaded"] * 2
        assert "HTTP Error 404: Not Found" in rejects["message"][0].as_py()


def test_ids_may_be_whole_numbers(photos: list[Path], expected: np.ndarray, tmp_path: Path) -> None:
    write(tmp_path / "m.parquet", {"image_id": list(range(COUNT)), "uri": [str(photo) for photo in photos]})
    clipray_here(["embed", "m.parquet", "out", "--model", "demo"], tmp_path)
    table = read_table(str(tmp_path / "out/images")).sort_by("image_id")
    assert table["image_id"].to_pylist() == NUMBERS
    assert np.abs(np.stack(table["clip"].to_numpy()) - expected).max() <= 1e-6
