"""`clipray --help`: every command in one whole line of a terminal of 80 columns, in groups."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from clipray.cli import app

COMMANDS = {command.name or command.callback.__name__: command for command in app.registered_commands}


@pytest.fixture
def lines() -> list[str]:
    return CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output.splitlines()


def test_every_command_has_one_whole_line(lines: list[str]) -> None:
    for name, command in COMMANDS.items():
        summary = (command.callback.__doc__ or "").split("\n")[0].rstrip(".")
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.removeprefix(f"  {name}").strip().rstrip(".") == summary
        assert len(line) <= 80


def test_commands_stand_in_groups(lines: list[str]) -> None:
    groups: dict[str, list[str]] = {}
    for line in lines[lines.index("Run:") :]:
        if title := re.fullmatch(r"(\w+):", line):
            groups[title[1]] = []
        elif line:
            groups[list(groups)[-1]].append(line.split()[0])
    assert list(groups) == ["Run", "Look", "Prepare", "Cluster"]
    assert {name: title for title, names in groups.items() for name in names} == {
        name: command.rich_help_panel for name, command in COMMANDS.items()
    }
