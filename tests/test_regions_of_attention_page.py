"""docs/regions-of-attention.md: one of its five prompts runs on the demo's world, and its table says what that measures."""

from __future__ import annotations

import re

import pytest
import yaml
from support import DOCS, ROOT, follow

from clipray import tables
from clipray.demo.world import write_world
from clipray.job.load import parse_job

PAGE = (DOCS / "regions-of-attention.md").read_text(encoding="utf-8")
PROMPTS = ("foveal",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> dict[tuple[str, str, str | None], float]:
    """Figures by step, name and group. Of the demo only its world is needed, of the job the steps of PROMPTS."""
    home = tmp_path_factory.mktemp("attention")
    write_world(home / "runs" / "demo" / "world")
    job = yaml.safe_load((ROOT / "jobs" / "referring.yaml").read_text(encoding="utf-8"))
    *steps, evaluated = job["steps"]
    named = {kind: [step[kind] for step in steps if kind in step] for kind in ("embed_regions", "refer", "label")}
    assert all(len(found) == 5 for found in named.values())
    sets = evaluated["evaluate_labels"]["sets"]
    evaluated["evaluate_labels"] = {"sets": {name: sets[name] for name in PROMPTS}}
    kept = [step for step in steps if next(iter(step.values()))["name"].split("_")[-1] in PROMPTS]
    (home / "jobs").mkdir()
    (home / "jobs" / "referring.yaml").write_text(yaml.safe_dump({**job, "steps": [*kept, evaluated]}))
    referring, clouds = PAGE.split("## Point clouds")
    assert referring.count("clipray demo\n") == 1
    printed = follow(referring.replace("clipray demo\n", ""), home)
    assert "referred_foveal" in printed
    assert parse_job((ROOT / "jobs" / "point_clouds.yaml").read_text(encoding="utf-8"))
    assert "clipray run jobs/point_clouds.yaml" in clouds
    metrics = tables.read_table(str(home / "runs/referring/metrics")).to_pylist()
    return {(row["step"], row["metric"], row["group"]): row["value"] for row in metrics}


def test_the_table_says_what_is_measured(measured: dict[tuple[str, str, str | None], float]) -> None:
    """To two boxes of a hundred: bf16, where a machine has it, moves some."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
    for prompt in PROMPTS:
        said = [float(cell.removesuffix(" %")) / 100 for cell in rows[prompt].split(" | ")]
        found = [
            measured[f"referred_{prompt}", "accuracy_of_several", None],
            measured["label_figures", "top1", f"{prompt}/template"],
            measured["label_figures", "top5", f"{prompt}/template"],
        ]
        assert found == pytest.approx(said, abs=0.021), prompt


def test_turned_attention_finds_far_more_than_a_guess(measured: dict[tuple[str, str, str | None], float]) -> None:
    found, guess = (measured["referred_foveal", f"{name}_of_several", None] for name in ("accuracy", "chance"))
    assert found > guess + 0.5
