"""What pages, the workflow and the hooks say of this checkout is there."""

from __future__ import annotations

import re
import tomllib

import pytest
import yaml
from support import DOCS, ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/README.md"])
def test_pages_name_targets_of_make_and_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.M)) <= TARGETS
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_workflow_calls_targets_of_make() -> None:
    (job,) = yaml.safe_load(WORKFLOW)["jobs"].values()
    assert "make ${{ matrix.target }}" in [step.get("run") for step in job["steps"]]
    assert {"check", "test"} <= set(job["strategy"]["matrix"]["target"]) <= TARGETS


def test_the_lowest_versions_are_those_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tested = [*project["dependencies"], *extras["test"], *extras["serve"], *extras["umap"]]
    bounds = dict(found.groups() for line in tested if (found := re.match(r"([\w-]+)(?:\[.*\])?>=([\d.]+)", line)))
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(re.split("={2,3}", line) for line in lines if not line.startswith("#"))
    assert lowest.keys() == bounds.keys()
    assert {name: version for name, version in lowest.items() if not f"{version}.".startswith(f"{bounds[name]}.")} == {}


def test_hooks_call_the_tools_of_make_lint() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    tools = [
        re.findall(r"\.venv/bin/\w+(?: \w+)?", hook["entry"])[0] for repo in config["repos"] for hook in repo["hooks"]
    ]
    assert tools == [
        tool.replace("$(VENV)", ".venv")
        for tool in re.findall(r"^\t(\$\(VENV\)/bin/(?:ruff|mypy)(?: \w+)?)", MAKEFILE, re.M)
    ]


def test_the_index_of_docs_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \|", index, re.M)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md") if path.name != "README.md")


def test_the_tree_of_the_package_is_true() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    floors = {name: int(floor) for name, floor in re.findall(r"^  (\w+)/ +(\d)  ", text, re.M)}
    assert floors.keys() == {path.parent.name for path in (ROOT / "clipray").glob("*/__init__.py")}
    for path in (ROOT / "clipray").glob("*/**/*.py"):
        wing = path.relative_to(ROOT / "clipray").parts[0]
        imported = set(re.findall(r"^\s*(?:from|import) clipray\.(\w+)", path.read_text(encoding="utf-8"), re.M))
        assert [other for other in imported & floors.keys() - {wing} if floors[other] >= floors[wing]] == []
