"""The README's commands and code run as they stand, in a folder of their own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import CLIPRAY, ROOT, draw_pictures
from typer.testing import CliRunner

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The `clipray` lines of all bash blocks, in order, with whether they need the network."""
    for kind, text in BLOCKS:
        if kind == "bash" and "needs the network" not in text:
            for line in text.splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["clipray"]:
                    yield words


def job_files() -> Iterator[tuple[str, str]]:
    """Name, from the comment in its first line, and text of each job file."""
    for kind, text in BLOCKS:
        if kind == "yaml":
            yield text.splitlines()[0].removeprefix("# "), text


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README has been followed: pictures, the job file, the commands."""
    home = tmp_path_factory.mktemp("readme")
    draw_pictures(home / "photos", 12)
    for name, text in job_files():
        (home / name).write_text(text)
    for words in commands():
        done = subprocess.run([CLIPRAY, *words[1:]], cwd=home, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}{done.stderr}"
    return home


def test_commands_make_what_the_readme_says(workplace: Path) -> None:
    assert (workplace / "runs/photos/job.yaml").is_file()
    for name in ("images/_table.json", "events.jsonl"):
        assert (workplace / "runs/job" / name).is_file()
    assert len(list((workplace / "runs/job/images").glob("part-*.parquet"))) >= 1


@pytest.mark.parametrize("number", range(sum(kind == "python" for kind, _ in BLOCKS)))
def test_code_runs(number: int, workplace: Path) -> None:
    code = [text for kind, text in BLOCKS if kind == "python"][number]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_verb_is_in_the_readme() -> None:
    from clipray.cli import app

    text = CliRunner().invoke(app, ["--help"]).output
    verbs = set(re.findall(r"^\W*([\w-]+) {2,}\S", text, re.MULTILINE)) & {
        c.name or c.callback.__name__ for c in app.registered_commands
    }
    assert len(verbs) == len(app.registered_commands)
    assert not [verb for verb in verbs if f"clipray {verb}" not in README and f"make {verb}" not in README]


def test_commands_that_need_the_network_are_at_least_spelled_right() -> None:
    import open_clip

    lines = [
        line
        for kind, text in BLOCKS
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
