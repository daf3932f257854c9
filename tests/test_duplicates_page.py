"""docs/duplicates.md runs as it stands, and finds what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import DOCS, follow

from clipray import tables

PAGE = (DOCS / "duplicates.md").read_text(encoding="utf-8")


def test_the_page_finds_the_copies_it_says(tmp_path: Path, ray_here: object) -> None:
    """To a few: bf16, where a machine has it, moves cosines that are near the threshold."""
    follow(PAGE, tmp_path)
    images, found = (tables.read_table(str(tmp_path / f"runs/copies/{name}")) for name in ("images", "duplicates"))
    group = dict(zip(found["image_id"].to_pylist(), found["group_id"].to_pylist(), strict=True))
    copies = [name for name in images["image_id"].to_pylist() if "-copy" in name]
    together = sum(name in group and group[name] == group.get(name.replace("-copy", "")) for name in copies)
    pictures: dict[int, set[str]] = {}
    for name, number in group.items():
        pictures.setdefault(number, set()).add(name.replace("-copy", ""))
    mixed = sum(len(names) > 1 for names in pictures.values())
    dropped = found["kept"].to_pylist().count(False)
    (similarity,) = re.findall(r"similarity: ([\d.]+)", PAGE)
    row = next(row for row in re.findall(r"^\| ([\d. |]+) \|$", PAGE, re.M) if row.startswith(similarity))
    said = [int(cell) for cell in row.split(" | ")[1:]]
    assert [together, len(pictures), mixed, dropped] == pytest.approx(said, abs=8)
    assert (len(images), len(copies)) == (580, 116)
