"""docs/retrieval.md: its commands run as they stand, its table says what they measure, its other job is valid."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support import BLOCK, DOCS, ROOT, follow

from clipray import tables
from clipray.job.load import parse_job

PAGE = (DOCS / "retrieval.md").read_text(encoding="utf-8")
VECTORS = {
    "MAC": "found_mac",
    "R-MAC, 5 squares": "found_rmac",
    "R-MAC, 16 components, whitened": "found_whitened",
    "R-MAC, each vector averaged with its nearest 3": "found_augmented",
}
LISTS = {
    "R-MAC, the first 100 re-ranked by their best square": "found_reranked",
    "R-MAC, query expanded by its first 3 answers": "found_expanded",
}
PROTOCOLS = ("easy", "medium", "hard")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    home = tmp_path_factory.mktemp("retrieval")
    shutil.copytree(ROOT / "jobs", home / "jobs")
    follow(PAGE, home)
    return home


def test_the_table_says_what_is_measured(followed: Path) -> None:
    """To two figures: bf16, where a machine has it, moves the third."""
    metrics = tables.read_table(str(followed / "runs/retrieval/metrics")).to_pylist()
    measured = {(m["step"], m["group"]): m["value"] for m in metrics if m["metric"] == "mAP"}
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", PAGE, re.M))
    for name, step in (VECTORS | LISTS).items():
        distances = ("/cosine", "/l2") if name in VECTORS else ("",)
        expected = [measured[step, f"{protocol}{distance}"] for distance in distances for protocol in PROTOCOLS]
        found = [float(cell) for cell in rows[name].split(" | ") if cell != "–"]
        assert found == pytest.approx(expected, abs=0.015), name
    assert (
        measured["found_mac", "medium/cosine"]
        < measured["found_rmac", "medium/cosine"]
        < measured["found_expanded", "medium"]
    )


def test_the_other_job_is_valid() -> None:
    (text,) = (text for kind, text in BLOCK.findall(PAGE) if kind == "yaml")
    assert parse_job(f"output: out\nmodel: {{name: demo}}\n{text}").steps
