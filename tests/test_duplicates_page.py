"""docs/duplicates.md runs as it stands, and finds what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import CLIPRAY, ROOT

from clipray import tables

PAGE = (ROOT / "docs" / "duplicates.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.M | re.S)


def test_the_page_finds_the_copies_it_says(tmp_path: Path) -> None:
    """To a few: bf16, where a machine has it, moves cosines that are near the threshold."""
    for kind, text in BLOCKS:
        if kind == "yaml":
            (tmp_path / "job.yaml").write_text(text, encoding="utf-8")
            continue
        command = [sys.executable, "-c", text] if kind == "python" else [CLIPRAY, *text.split()[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
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
