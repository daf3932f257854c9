"""Private names of other libraries are used in two guarded places, and a run does without them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("clipray", "tools")
LIBRARIES = {"faiss", "open_clip", "PIL", "polars", "pyarrow", "ray", "safetensors", "timm", "torch", "torchvision"}
GUARDED = {
    "ray_internals": "tests/run/test_without_private_names.py",
    "packed": "test_a_torch_without_the_operators_keeps_its_plain_layers",
}
"""By module the test that takes its private names away."""


def is_private(name: str) -> bool:
    return (name.startswith("_") and not name.startswith("__")) or "internal" in name


def is_of_a_library(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in LIBRARIES


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that the package defines itself."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return names


def private_names(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Imports of private modules and names, private attributes that are not the package's own, and either as a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                a.name for a in node.names if is_of_a_library(a.name) and any(map(is_private, a.name.split(".")))
            )
        elif isinstance(node, ast.ImportFrom) and node.module and is_of_a_library(node.module):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (path for path in paths if any(map(is_private, path.split("."))))
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = re.findall(r"[\w.]+", node.value)
            yield from (word for word in words if is_of_a_library(word) and any(map(is_private, word.split("."))))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ray._private import worker", ["ray._private.worker"]),
        ("from open_clip.model import _build_vision_tower", ["open_clip.model._build_vision_tower"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("torch._foreach_copy_(a, b)", ["_foreach_copy_"]),
        ("visual._embeds(x)", ["_embeds"]),
        ("data.iter_internal_ref_bundles()", ["iter_internal_ref_bundles"]),
        ("import_module('torch._dynamo')", ["torch._dynamo"]),
        ("self._own()\nnode.__name__\nfrom __future__ import annotations\nfrom clipray.x import _y", []),
    ],
)
def test_private_names_are_seen(code: str, found: list[str]) -> None:
    assert list(private_names(ast.parse(code), {"_own"})) == found


def test_private_names_are_used_in_guarded_places_alone() -> None:
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    own = own_names(list(trees.values())) | {"_exit"}  # os._exit is public
    used = {path.stem: names for path, tree in trees.items() if (names := list(private_names(tree, own)))}
    assert used.keys() == GUARDED.keys(), used


@pytest.mark.parametrize("test", GUARDED.values())
def test_each_guarded_place_has_its_test(test: str) -> None:
    tests = Path(__file__).parents[1]
    assert (tests.parent / test).is_file() or any(test in path.read_text() for path in tests.rglob("test_*.py"))
