"""docs/regions.md runs as it stands: its job, its commands and its code, one after the other, in a folder of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import DOCS, follow

from clipray import tables


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> tuple[Path, str]:
    """The folder in which the page has been followed, and what its code printed."""
    home = tmp_path_factory.mktemp("regions")
    return home, follow((DOCS / "regions.md").read_text(encoding="utf-8"), home)


def test_the_page_makes_pictures_and_their_regions(followed: tuple[Path, str]) -> None:
    out = followed[0] / "runs" / "regions"
    images, regions = (tables.read_table(out / name) for name in ("images", "regions"))
    assert sum(images["region_count"].to_pylist()) == regions.num_rows
    given = sum(name.split("#")[1].startswith("b") for name in regions["region_id"].to_pylist())
    assert given == sum(len(boxes or ()) for boxes in images["boxes"].to_pylist()) > 100
    assert regions.num_rows == given + 5 * images.num_rows
    assert len(list(followed[0].glob("*.png"))) == 3


def test_a_box_finds_boxes_with_the_same_thing(followed: tuple[Path, str]) -> None:
    """As the page says; a box that was pooled from another place of the map would find hardly any."""
    (share,) = re.findall(r"same colour and shape: ([\d.]+)", followed[1])
    assert float(share) > 0.4
