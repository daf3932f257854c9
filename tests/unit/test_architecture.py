"""The floors of the house: each module stands only on those below it, and Ray and torch stay where they belong."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clipray"

# From the ground up. A module imports only from floors below its own; a package (encoders, engine, steps) also itself.
FLOORS = [
    {"digests", "errors", "reports", "kinds", "printing", "reasons", "seals", "uris"},
    {"storage", "settings"},
    {"environment", "notes"},
    {"parquet", "plain_yaml"},
    {"tables", "analysis", "class_lists", "plots", "contact_sheet", "plain_pickle"},
    {"folder_listing"},
    {"parquet_files", "image_listing"},
    {"job", "manifest", "events"},
    {"scan", "vectors", "classes"},
    {"contents"},
    {"ledger", "lookup", "run_status", "labelled", "vector_search"},
    {"relevance", "ground_truth", "verify"},
    {"encoders"},
    {"engine", "run_page"},
    {"steps"},
    {"runner"},
    {"quick_search"},
    {"search_page"},
    {"oneline", "quick_labels", "display", "demo", "submit"},
    {"cli", "__init__"},
    {"__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """`clipray/engine/plan.py` -> `engine`; `clipray/job.py` -> `job`."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports anywhere in it, also in functions: `clipray.tables`, `ray.data`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The parts of clipray that a module imports: `tables`, `engine`."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("clipray.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def test_the_reader_of_imports_reads_imports() -> None:
    assert own_imports(PACKAGE / "tables/shards.py") == {"errors", "parquet", "seals", "storage", "tables"}
    assert {"encoders", "engine", "ledger", "manifest", "tables"} <= own_imports(
        PACKAGE / "steps/embed_images.py"
    ) | own_imports(PACKAGE / "steps/attempt.py")
    assert any(name.split(".")[0] == "ray" for path in (PACKAGE / "engine").glob("*.py") for name in imports(path))


def test_every_module_has_a_floor() -> None:
    assert {part_of(path) for path in modules()} == LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stands_only_on_lower_floors(path: Path) -> None:
    own = part_of(path)
    for other in own_imports(path):
        inside = own == other and path.parent != PACKAGE
        assert inside or LEVEL[other] < LEVEL[own], f"{own} imports {other}"


def test_only_the_engine_imports_ray() -> None:
    users = {part_of(path) for path in modules() if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert users == {"engine"}


def test_torch_and_open_clip_stay_where_vectors_are_computed() -> None:
    heavy = {"torch", "torchvision", "open_clip", "timm", "huggingface_hub"}
    users = {part_of(path) for path in modules() if any(name.split(".")[0] in heavy for name in imports(path))}
    assert users - {"demo"} <= {"encoders", "analysis", "engine", "runner"}


def test_the_demo_is_apart() -> None:
    assert {part_of(path) for path in modules() if "demo" in own_imports(path)} <= {"demo", "cli"}


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in modules():
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {f.id for f in calls if isinstance(f, ast.Name)} & {"eval", "exec", "__import__"}, path
        assert not {f.attr for f in calls if isinstance(f, ast.Attribute)} & {"unsafe_load", "full_load"}, path
        assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "cloudpickle", "dill", "joblib"}, path
        assert "allow_pickle" not in path.read_text(), path
        assert "weights_only=False" not in path.read_text(), path


@pytest.mark.parametrize(
    "module", ["clipray", "clipray.cli", "clipray.runner", "clipray.manifest", "clipray.run_status"]
)
def test_importing_is_light(module: str) -> None:
    """No torch, no Ray, no thread, nothing written, nothing said."""
    code = f"""
import sys, threading
import {module} as module
[getattr(module, name) for name in getattr(module, "__all__", ())]
heavy = {{"torch", "ray", "open_clip", "torchvision", "transformers", "timm"}} & sys.modules.keys()
print(sorted(heavy), threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


def test_no_verb_is_named_as_a_module() -> None:
    """A module that is imported would take the place of the function in the package."""
    import clipray

    assert not set(clipray.__all__) & {path.stem for path in PACKAGE.glob("*")}


def test_reading_a_picture_needs_no_torch() -> None:
    code = "import sys; from clipray.encoders import images; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_ask_for_what_is_there(path: Path) -> None:
    """They run by hand only, and import much of it late."""
    for name in imports(path):
        if name.startswith("clipray."):
            module, _, attribute = name.rpartition(".")
            there = hasattr(importlib.import_module(module), attribute) if module != "clipray" else False
            assert there or importlib.util.find_spec(name), name
