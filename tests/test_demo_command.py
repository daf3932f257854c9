"""`clipray demo`: the whole product on the built-in world, in its own process."""

from __future__ import annotations

import subprocess
from pathlib import Path

from support import CLIPRAY

from clipray.demo.tour import nearest_pictures
from clipray.storage import Folder
from clipray.tables import read_record, read_table


def test_demo_makes_tables_that_are_right(tmp_path: Path) -> None:
    done = subprocess.run(
        [CLIPRAY, "demo", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Look next at:" in done.stdout
    record = read_record(Folder(str(tmp_path / "demo" / "images")))
    assert record is not None
    assert (record.rows, record.rejects) == (464, 0)
    assert set(read_table(str(tmp_path / "demo" / "images"))["kind"].to_pylist()) == {
        "single",
        "group",
        "word",
        "place",
    }
    _, same = nearest_pictures(str(tmp_path / "demo" / "images"))
    assert same > 0.9
