"""YAML of job and class files: plain values only, and refused before its aliases, numbers or length cost anything."""

from __future__ import annotations

from typing import Any

import yaml

from clipray.errors import ClipRayError, JobError, one_line
from clipray.storage.folder import filesystem, refuse_irregular

LOADER = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # the same values; a megabyte takes the one in Python half a minute
ALIASED_NODES = 100_000  # that aliases may stand for, beyond what is written out
DEEPEST = 100  # lists and mappings within one another
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
LONGEST_NUMBER = 200  # characters of what is no text: an integer in base 60 takes a time that is quadratic in them


def read_text(path: str, what: str, error: type[ClipRayError] = JobError, max_bytes: int = 2**20) -> str:
    """The text of a file in UTF-8, a local path or any fsspec URL.

    Raises:
        ClipRayError: `error` where there is no such file (`what`), or it cannot be read. JobError: it is too long.
    """
    fs, inner = filesystem(path)
    try:
        refuse_irregular(fs, inner)
        with fs.open(inner, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise JobError(f"{path}: expected a text of at most {max_bytes} bytes")
        return str(data.decode("utf-8-sig"))  # Windows puts a mark before it
    except FileNotFoundError as missing:
        raise error(f"{path}: no such {what}") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise error(f"{path}: cannot be read: {unreadable}") from unreadable


def load_yaml(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The values of one YAML document, and its nodes, which know their lines. `where` names it in errors.

    Raises:
        JobError: not YAML of plain values, or aliases that stand for too many.
    """
    try:
        _check_depth(text, where)
        root = yaml.compose(text, Loader=LOADER)
        if root is not None:
            _check(root, where)
        return yaml.load(text, Loader=LOADER), root
    except RecursionError as error:
        raise JobError(f"{where}: not valid YAML: an alias that holds itself") from error
    except ValueError as error:  # such as a date that does not exist
        raise JobError(f"{where}: not valid YAML: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise JobError(f"{where}:{line}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{where}: not valid YAML: {one_line(error)}") from error


def _check_depth(text: str, where: str) -> None:
    """Composing is recursive, in C: what is nested too deeply would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise JobError(f"{where}:{line}: too deeply nested; expected at most {DEEPEST} levels")


def _check(root: yaml.Node, where: str) -> None:
    """Raise JobError for aliases that stand for too much and for endless numbers, RecursionError for an alias in itself."""
    sizes: dict[int, int] = {}
    if _expanded_nodes(root, sizes, where) > len(sizes) + ALIASED_NODES:
        raise JobError(
            f"{where}: its aliases stand for more than {ALIASED_NODES} values beyond the {len(sizes)} that are written: "
            "write fewer aliases of aliases"
        )


def _expanded_nodes(node: yaml.Node, sizes: dict[int, int], where: str) -> int:
    """Of a node and all below it, each counted as often as aliases name it. `sizes`: by node; 0 of those under way."""
    known = sizes.get(id(node))
    if known == 0:
        raise RecursionError
    if known is not None:
        return known
    sizes[id(node)] = 0
    size = 1 + sum(_expanded_nodes(child, sizes, where) for child in _children(node))
    if isinstance(node, yaml.ScalarNode) and node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
        line = node.start_mark.line + 1
        raise JobError(f"{where}:{line}: a number of {len(node.value)} characters; expected at most {LONGEST_NUMBER}")
    sizes[id(node)] = size
    return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []
