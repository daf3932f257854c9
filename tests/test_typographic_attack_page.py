"""docs/typographic-attack.md: half of its job runs on the demo's world, and its table says what that measures."""

from __future__ import annotations

import re

import pytest
import yaml
from support import DOCS, ROOT, follow

from clipray import tables
from clipray.demo.world import write_world

PAGE = (DOCS / "typographic-attack.md").read_text(encoding="utf-8")
ROWS = {
    "letters of 20 %, on a plate": "attacks_large",
    "control: the image's own name, 20 %, on a plate": "attacks_control",
}
COLUMNS = ("flip_rate", "flip_rate_to_word", "flip_rate_elsewhere", "accuracy_before", "accuracy_after")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> dict[tuple[str, str], float]:
    """Figures by step and name. Of the demo only its world is needed, of the job the steps of ROWS."""
    home = tmp_path_factory.mktemp("attack")
    write_world(home / "runs" / "demo" / "world")
    job = yaml.safe_load((ROOT / "jobs" / "typographic_attack.yaml").read_text(encoding="utf-8"))
    job["steps"] = [step for step in job["steps"] if step["attack"]["name"] in ROWS.values()]
    (home / "jobs").mkdir()
    (home / "jobs" / "typographic_attack.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert PAGE.count("clipray demo\n") == 1
    follow(PAGE.replace("clipray demo\n", ""), home)
    metrics = tables.read_table(str(home / "runs/typographic_attack/metrics")).to_pylist()
    return {(row["step"], row["metric"]): row["value"] for row in metrics if row["group"] is None}


def test_the_table_says_what_is_measured(measured: dict[tuple[str, str], float]) -> None:
    """To two pictures of a hundred: bf16, where a machine has it, moves some."""
    rows = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", PAGE, re.M))
    for name, step in ROWS.items():
        said = [None if cell == "–" else float(cell.removesuffix(" %")) / 100 for cell in rows[name].split(" | ")]
        for column, value in zip(COLUMNS, said, strict=True):
            if value is not None:
                assert measured[step, column] == pytest.approx(value, abs=0.02), (name, column)


def test_the_word_does_more_than_its_plate(measured: dict[tuple[str, str], float]) -> None:
    """And it is read: a guess among the 63 wrong classes would hit the word in 1.6 % of cases."""
    assert measured["attacks_large", "flip_rate"] > measured["attacks_control", "flip_rate"] + 0.1
    assert measured["attacks_large", "flip_rate_to_word"] > 5 / 63
    assert measured["attacks_control", "flip_rate_to_word"] == 0
