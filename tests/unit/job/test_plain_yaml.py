"""YAML that would take the machine is one line; aliases as people write them are values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from clipray.errors import JobError
from clipray.inputs.classes import prompt_styles
from clipray.job.load import load_job
from clipray.job.plain_yaml import ALIASED_NODES, load_yaml

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAUGHS = "".join(
    f"{letter}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n" for before, letter in itertools.pairwise(LETTERS)
)
MERGES = "".join(
    f"{letter}: &{letter} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n" for before, letter in itertools.pairwise(LETTERS)
)
BOMBS = {
    "lists": ("a: &a [x, x]\n" + LAUGHS, "its aliases stand for more than 100000 values"),
    "merged mappings": ("a: &a {x: 1}\n" + MERGES, "its aliases stand for"),
    "a key": ("a: &a [x, x]\n" + LAUGHS + "? *z\n: 1\n", "its aliases stand for"),
    "itself": ("a: &a [*a]\n", "an alias that holds itself"),
    "itself, further down": ("a: &a {b: {c: [*a]}}\n", "an alias that holds itself"),
    "depth": ("a: " + "[" * 1_000_000, "too deeply nested"),
    "depth, closed": ("a: " + "[" * 20_000 + "]" * 20_000, "too deeply nested"),
    "depth of lines": ("- " * 200_000, ":1: too deeply nested; expected at most 100 levels"),
    "depth of mappings": ("{a: " * 20_000, "too deeply nested"),
    "a number in base 60": ("a: 1" + ":1" * 100_000, ":1: a number of 200001 characters; expected at most 200"),
    "a float in base 60": ("\na: 1" + ":1" * 100_000 + ".5", ":2: a number of"),
    "a hexadecimal": ("a: 0x" + "f" * 100_000, "a number of 100002 characters"),
    "decimals": ("a: " + "9" * 100_000, "a number of 100000 characters"),
    "length": ("a: " + "x" * 2**25, "expected a text of at most"),
}  # fmt: skip


def in_job(text: str, path: Path) -> None:
    path.write_text(text)
    load_job(path)


def in_classes(text: str, path: Path) -> None:
    path.write_text(text)
    prompt_styles(str(path))


@pytest.mark.parametrize("reader", [in_job, in_classes])
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line(name: str, reader: Callable[[str, Path], None], tmp_path: Path) -> None:
    text, words = BOMBS[name]
    path = tmp_path / "file.yaml"
    with pytest.raises(JobError) as error:
        reader(text, path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert words in message
    assert "\n" not in message
    assert len(message) < 1_000


def test_aliases_as_people_write_them_are_values() -> None:
    text = (
        "base: &base {size: 3, names: [a, b]}\nother: {<<: *base, size: 4}\nlist: &list [1, 2]\nagain: [*list, *list]\n"
    )
    values, root = load_yaml(text, "here")
    assert values["other"] == {"size": 4, "names": ["a", "b"]}
    assert values["again"] == [[1, 2], [1, 2]]
    assert root is not None
    assert load_yaml("", "here") == (None, None)
    assert load_yaml("a: 1:30\nb: 190:20:30\nc: 1.5", "here")[0] == {"a": 90, "b": 685230, "c": 1.5}


def test_the_bound_is_on_what_aliases_add() -> None:
    row = ", ".join(["x"] * 999)
    most = (ALIASED_NODES - 50) // 1_000  # of aliases of a list of 1,000 nodes with itself
    fits = f"a: &a [{row}]\nb: [{', '.join(['*a'] * most)}]\n"
    assert len(load_yaml(fits, "here")[0]["b"]) == most
    with pytest.raises(JobError, match="aliases stand for"):
        load_yaml(fits + f"c: [{', '.join(['*a'] * 2)}]\n", "here")


def test_many_values_that_are_written_out_are_fine() -> None:
    names = [f"class {n}" for n in range(ALIASED_NODES // 50)]
    assert load_yaml("\n".join(f"- {name}" for name in names), "here")[0] == names
