"""The floors of the house: each module stands only on those below it, and Ray and torch stay where they belong."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "clipray"

# From the ground up. A wing imports only from floors below its own, and from itself.
FLOORS = [
    {"errors"},
    {"storage", "analysis"},
    {"job", "tables"},
    {"models", "inputs"},
    {"pipelines"},
    {"engine", "report", "queries"},
    {"steps", "demo", "serve"},
    {"runner"},
    {"cli", "__init__"},
    {"__main__"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def wing_of(path: Path) -> str:
    """`clipray/engine/plan.py` -> `engine`; `clipray/errors.py` -> `errors`."""
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


def wings_imported(path: Path) -> set[str]:
    """The wings of clipray that a module imports: `tables`, `engine`."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("clipray.")}
    return {name for name in names if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def modules_imported(path: Path, root: Path = ROOT) -> set[Path]:
    """The files of this project that a module imports."""
    files = set()
    for name in imports(path):
        homes = [root.joinpath(*name.split(".")), root.joinpath(*name.split(".")[:-1])]
        candidates = [file for home in homes for file in (home.with_suffix(".py"), home / "__init__.py")]
        files.update(next(([file] for file in candidates if file.is_file()), []))
    return files - {path}


def circles(files: Collection[Path]) -> list[list[Path]]:
    """Groups of modules that import each other, also through others."""
    below = {path: modules_imported(path) & set(files) for path in files}
    changed = True
    while changed:
        changed = False
        for path, lower in below.items():
            more = lower.union(*(below[other] for other in lower))
            changed |= more != lower
            below[path] = more
    return sorted(
        {
            tuple(sorted(other for other in files if path in below[other] and other in below[path]))
            for path in files
            if path in below[path]
        }
    )


def test_the_reader_of_imports_reads_imports() -> None:
    assert wings_imported(PACKAGE / "tables/shards.py") == {"errors", "storage", "tables"}
    assert {"pipelines", "engine", "inputs", "tables"} <= wings_imported(PACKAGE / "steps/base/encode_run.py")
    assert any(name.split(".")[0] == "ray" for path in (PACKAGE / "engine").glob("*.py") for name in imports(path))
    assert PACKAGE / "inputs/row_index.py" in modules_imported(PACKAGE / "inputs/committed_rows.py")


def test_every_wing_has_a_floor() -> None:
    assert {wing_of(path) for path in modules()} == LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stands_only_on_lower_floors(path: Path) -> None:
    wing = wing_of(path)
    for other in wings_imported(path):
        inside = wing == other and path.parent != PACKAGE
        assert inside or LEVEL[other] < LEVEL[wing], f"{wing} imports {other}"


def test_numerics_raise_value_error() -> None:
    """The steps say it in the words of a job."""
    for path in (PACKAGE / "analysis").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("clipray.errors")], path


def test_no_modules_import_each_other() -> None:
    """The package itself apart: it imports its verbs when they are asked for."""
    files = {*modules(), *(ROOT / "tools").rglob("*.py")} - {PACKAGE / "__init__.py"}
    assert circles(sorted(files)) == []


def test_only_the_engine_imports_ray() -> None:
    users = {wing_of(path) for path in modules() if any(name.split(".")[0] == "ray" for name in imports(path))}
    assert users == {"engine"}


def test_no_module_imports_pandas() -> None:
    """Polars joins, counts and ranks."""
    assert not [path for path in modules() if any(name.split(".")[0] == "pandas" for name in imports(path))]


def test_torch_and_open_clip_stay_where_vectors_are_computed() -> None:
    heavy = {"torch", "torchvision", "open_clip", "timm", "huggingface_hub"}
    users = {wing_of(path) for path in modules() if any(name.split(".")[0] in heavy for name in imports(path))}
    assert users <= {"models", "pipelines", "analysis", "engine", "runner"}


def test_the_demo_is_apart() -> None:
    assert {wing_of(path) for path in modules() if "demo" in wings_imported(path)} <= {"demo", "cli"}


def test_nothing_is_pickled_or_evaluated() -> None:
    for path in modules():
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {f.id for f in calls if isinstance(f, ast.Name)} & {"eval", "exec", "__import__"}, path
        assert not {f.attr for f in calls if isinstance(f, ast.Attribute)} & {"unsafe_load", "full_load"}, path
        allowed = {"pickle"} if path.stem == "plain_pickle" else set()  # whose allowlist imports nothing
        assert {n.split(".")[0] for n in imports(path)} & {"pickle", "cloudpickle", "dill", "joblib"} <= allowed, path
        assert "allow_pickle" not in path.read_text(), path
        assert "weights_only=False" not in path.read_text(), path


@pytest.mark.parametrize(
    "module", ["clipray", "clipray.cli", "clipray.runner.run", "clipray.inputs.manifest", "clipray.runner.status"]
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


def test_what_workers_return_needs_no_torch_in_the_driver() -> None:
    """A result is unpickled by the module of its class: that of encoded classes once cost the driver five seconds."""
    from clipray.pipelines.class_texts import encode_classes

    (module,) = {get_type_hints(encode_classes)["return"].__module__}
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_reading_a_picture_needs_no_torch() -> None:
    code = "import sys; from clipray.pipelines import decode; print('torch' in sys.modules, 'ray' in sys.modules)"
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
