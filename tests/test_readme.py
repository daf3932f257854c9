"""The README's commands and code run as they stand, in a folder of their own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support import BLOCK, ROOT, draw_pictures, follow
from typer.testing import CliRunner

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> Path:
    """A folder in which the README has been followed: its job files, its commands, its code."""
    home = tmp_path_factory.mktemp("readme")
    draw_pictures(home / "photos", 12)
    follow(README, home)
    return home


def test_commands_make_what_the_readme_says(workplace: Path) -> None:
    assert (workplace / "runs/photos/job.yaml").is_file()
    for name in ("images/_table.json", "events.jsonl"):
        assert (workplace / "runs/job" / name).is_file()
    assert len(list((workplace / "runs/job/images").glob("part-*.parquet"))) >= 1


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_verb_is_in_the_readme_or_the_docs() -> None:
    from clipray.cli import app

    text = CliRunner().invoke(app, ["--help"]).output
    verbs = set(re.findall(r"^\W*([\w-]+) {2,}\S", text, re.MULTILINE)) & {
        c.name or c.callback.__name__ for c in app.registered_commands
    }
    assert len(verbs) == len(app.registered_commands)
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert not [verb for verb in verbs if f"clipray {verb}" not in pages]


def test_the_tree_of_folders_is_what_is_there() -> None:
    tree = README[README.index("clipray/      ") :]
    wings = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert wings == {path.name for path in (ROOT / "clipray").iterdir() if (path / "__init__.py").is_file()}
    rooms = set(re.findall(r"^(\w+)/", tree, re.MULTILINE)) | set(re.findall(r"(\w+)/", tree.splitlines()[-2]))
    assert {name for name in rooms if not (ROOT / name).is_dir()} == set()
    assert rooms >= {"clipray", "jobs", "schemas", "deploy", "docs", "benchmarks", "tests", "tools"}


def test_commands_that_need_the_network_are_at_least_spelled_right() -> None:
    import open_clip

    lines = [
        line
        for kind, text in BLOCK.findall(README)
        if "needs the network" in text
        for line in text.splitlines()
        if line.startswith("clipray")
    ]
    assert lines
    for line in lines:
        words = shlex.split(line)
        if "--pretrained" in words:
            tag, name = words[words.index("--pretrained") + 1], words[words.index("--model") + 1]
            assert tag in open_clip.list_pretrained_tags_by_model(name)
