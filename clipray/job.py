"""Job files: YAML -> validated `Job`, every mistake with its line; and the fingerprints of what a step writes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from clipray.errors import JobError
from clipray.settings import STEPS, EmbedImages, Job
from clipray.storage import absolute, filesystem

Place = tuple[str | int, ...]


def load_job(path: str) -> Job:
    """Read and validate a job file (a local path or any fsspec URL).

    Raises:
        JobError: one line per mistake, each with file, line and what to do.
    """
    try:
        fs, inner = filesystem(path)
        text = fs.cat_file(inner).decode("utf-8")
    except FileNotFoundError as error:
        raise JobError(f"{path}: no such job file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read: {error}") from error
    return parse_job(text, path)


def parse_job(text: str, where: str = "job") -> Job:
    """Validate the text of a job file; `where` names it in errors. See `load_job`."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_places(root, ())) if root else {}
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise JobError(f"{where}:{line}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise JobError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise JobError(f"{where}: expected a mapping with `output`, `model` and `steps`, found {type(values).__name__}")
    mistakes = [
        f"{where}:{lines[place]}: key {_dotted(place[:-1])!r} appears twice"
        for place in lines
        if place and place[-1] == "<twice>"
    ]
    job = _validated(Job, values, (), lines, where, mistakes)
    steps = list(_step_settings(values.get("steps"), lines, where, mistakes))
    names = [step.name for step in steps]
    mistakes += [
        f"{where}: two steps write a table {name!r}: give one another `name`"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if mistakes or job is None:
        raise JobError("\n".join(mistakes))
    return job.model_copy(update={"output": absolute(job.output)})


def steps_of(job: Job) -> list[EmbedImages]:
    """The validated settings of each step, in order."""
    return [STEPS[kind](**(settings or {})) for step in job.steps for kind, settings in step.items()]


def step_kind(settings: BaseModel) -> str:
    """The name under which a job file knows these settings: `embed_images`."""
    return next(kind for kind, cls in STEPS.items() if isinstance(settings, cls))


def _step_settings(steps: Any, lines: dict[Place, int], where: str, mistakes: list[str]) -> Iterator[EmbedImages]:
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        place: Place = ("steps", index)
        if not isinstance(step, dict) or len(step) != 1:
            mistakes.append(
                f"{where}:{lines.get(place, 1)}: a step is one name and its settings, `- embed_images: {{...}}`; found {step!r}"
            )
            continue
        ((kind, settings),) = step.items()
        if kind not in STEPS:
            mistakes.append(
                f"{where}:{lines.get((*place, kind), 1)}: unknown step {kind!r}{_nearest(str(kind), list(STEPS))}"
            )
            continue
        if settings is not None and not isinstance(settings, dict):
            mistakes.append(
                f"{where}:{lines.get((*place, kind), 1)}: {kind} needs settings as a mapping, found {settings!r}"
            )
            continue
        checked = _validated(STEPS[kind], settings or {}, (*place, kind), lines, where, mistakes)
        if checked is not None:
            yield checked


def _validated(
    cls: type[Any], values: dict[str, Any], place: Place, lines: dict[Place, int], where: str, mistakes: list[str]
) -> Any:
    try:
        return cls(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        for detail in error.errors():
            loc = (*place, *detail["loc"])
            line = next(lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines)
            message = f"{where}:{line}: {_dotted(loc)}: {_explain(cls, detail)}"
            if message not in mistakes:
                mistakes.append(message)
        return None


def _explain(cls: type[BaseModel], detail: Mapping[str, Any]) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key{_nearest(str(detail['loc'][-1]), _known_keys(cls, detail['loc'][:-1]))}"
    if detail["type"] == "missing":
        return "is missing"
    found = (
        f", found {detail['input']!r}"
        if detail.get("input") is not None and not isinstance(detail["input"], dict)
        else ""
    )
    return detail["msg"].removeprefix("Value error, ") + found


def _known_keys(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Keys that the settings at `loc` know: follow the fields down, through dicts of settings."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        if field is None:
            continue  # a key of a dict such as `features: {NAME: ...}`
        inner = [
            a
            for a in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(a, type) and issubclass(a, BaseModel)
        ]
        if inner:
            cls = inner[0]
    return list(cls.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(known)}"


def _dotted(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")


def _places(node: yaml.Node, place: Place) -> Iterator[tuple[Place, int]]:
    """Line (from 1) of every key and item; a key written twice appears once more as (..., key, '<twice>')."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            inner = (*place, key.value)
            if key.value in seen:
                yield (*inner, "<twice>"), key.start_mark.line + 1
            seen.add(key.value)
            yield from _places(value, inner)
            yield inner, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _places(value, (*place, index))


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 (first 16 hex digits) of settings as canonical JSON: equal if and only if the settings are."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one phrase per setting: `model.name was 'RN50', is 'ViT-B-32'`."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{place}.{key}".lstrip("."))
    else:
        yield place, value


def dump_job(values: Mapping[str, Any]) -> bytes:
    """The text of a job file that `load_job` reads back."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode()
