"""Job files: YAML -> validated `Job`, every mistake with its line; and the fingerprints of what a step writes."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError

from clipray.errors import JobError
from clipray.job import STEPS, EmbedImages, Job, ModelStep, StepSettings
from clipray.job.plain_yaml import load_yaml, read_text
from clipray.storage.folder import absolute

Place = tuple[str | int, ...]
LONGEST_MISTAKE = 600  # characters
TAKEN = ("metrics", "rejects")  # folders of every run
TYPES = {
    "model_type": "expected a mapping", "dict_type": "expected a mapping", "list_type": "expected a list",
    "tuple_type": "expected a list", "string_type": "expected a string", "int_parsing": "expected an integer",
    "int_type": "expected an integer", "int_from_float": "expected an integer", "float_parsing": "expected a number",
    "float_type": "expected a number", "bool_type": "expected true or false", "bool_parsing": "expected true or false",
}  # fmt: skip
"""Pydantic's types of errors, in the words of a job file."""


def load_job(path: str | os.PathLike[str]) -> Job:
    """Read and validate a job file (a local path or any fsspec URL).

    Raises:
        JobError: one line per mistake, each with file, line and what to do.
    """
    path = os.fspath(path)
    return parse_job(read_text(path, "job file"), path)


def parse_job(text: str, where: str = "job") -> Job:
    """Validate the text of a job file; `where` names it in errors. See `load_job`."""
    values, root = load_yaml(text, where)
    lines = dict(_places(root, ())) if root else {}
    if not isinstance(values, dict):
        raise JobError(f"{where}: expected a mapping with `output`, `model` and `steps`, found {type(values).__name__}")
    mistakes = [
        f"{where}:{lines[place]}: key {_dotted(place[:-1])!r} appears twice"
        for place in lines
        if place and place[-1] == "<twice>"
    ]
    job = _validated(Job, values, (), lines, where, mistakes)
    steps = list(_step_settings(values.get("steps"), lines, where, mistakes))
    names = [table for step in steps for table in step.tables]
    mistakes += [
        f"{where}: two steps write a table {name!r}: give one another `{_table_setting(steps, name)}`"
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    mistakes += [
        f"{where}: a step writes a table {name!r}, whose place is taken by clipray's own: give it another `{_table_setting(steps, name)}`"
        for name in dict.fromkeys(names)
        if name.lower() in TAKEN
    ]
    mistakes += [
        f"{where}: tables {first!r} and {second!r} are the same to file systems that ignore case: rename one"
        for first, second in itertools.pairwise(sorted(set(names), key=lambda name: (name.lower(), name)))
        if first.lower() == second.lower()
    ]
    needy = [step_kind(step) for step in steps if isinstance(step, ModelStep) and step.model is None]
    if job is not None and job.model is None and needy:
        mistakes.append(f"{where}: model: is missing: {needy[0]} needs one, of the job or its own")
    if mistakes or job is None:
        raise JobError("\n".join(_short(mistake) for mistake in mistakes))
    return job.model_copy(update={"output": absolute(job.output)})


def _short(mistake: str) -> str:
    """Shorten a mistake, which may quote a long value."""
    return mistake if len(mistake) <= LONGEST_MISTAKE else f"{mistake[:LONGEST_MISTAKE]}…"


def _table_setting(steps: Sequence[StepSettings], table: str) -> str:
    """The setting that names a table."""
    regional = any(isinstance(step, EmbedImages) and table in step.tables[1:] for step in steps)
    return "regions_name" if regional else "name"


def steps_of(job: Job) -> list[StepSettings]:
    """The validated settings of each step, in order."""
    return [STEPS[name](**(settings or {})) for step in job.steps for name, settings in step.items()]


def step_kind(settings: BaseModel) -> str:
    """The name under which a job file knows these settings: `embed_images`."""
    return next(name for name, cls in STEPS.items() if isinstance(settings, cls))


def _step_settings(steps: Any, lines: dict[Place, int], where: str, mistakes: list[str]) -> Iterator[StepSettings]:
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        place: Place = ("steps", index)
        if not isinstance(step, dict) or len(step) != 1:
            mistakes.append(
                f"{where}:{lines.get(place, 1)}: a step is one name and its settings, `- embed_images: {{...}}`; found {step!r}"
            )
            continue
        ((name, settings),) = step.items()
        if name not in STEPS:
            mistakes.append(
                f"{where}:{lines.get((*place, str(name)), 1)}: unknown step {name!r}{_nearest(str(name), list(STEPS))}"
            )
            continue
        if settings is not None and not isinstance(settings, dict):
            mistakes.append(
                f"{where}:{lines.get((*place, name), 1)}: {name} needs settings as a mapping, found {settings!r}"
            )
            continue
        checked = _validated(STEPS[name], settings or {}, (*place, name), lines, where, mistakes)
        if checked is not None:
            yield checked


def _validated(
    cls: type[Any], values: dict[str, Any], place: Place, lines: dict[Place, int], where: str, mistakes: list[str]
) -> Any:
    try:
        return cls(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        for detail in _narrowed(values, error.errors()):
            if cls is Job and detail["loc"][0] == "steps" and len(detail["loc"]) > 1:
                continue  # `_step_settings` says it in more words
            inner = _inside(values, detail)
            loc = (*place, *inner)
            line = next(lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines)
            message = f"{where}:{line}: {f'{_dotted(loc)}: ' if loc else ''}{_explain(cls, detail, inner, values)}"
            if message not in mistakes:
                mistakes.append(message)
        return None


def _narrowed(values: Any, details: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The mistakes without those of a union's other branches, if the value is a mapping."""
    branches = {_inside(values, detail) for detail in details if _mapping_branch(values, detail)}
    if not branches:
        return list(details)
    narrowed: list[Mapping[str, Any]] = []
    for detail in details:
        inner, loc = _inside(values, detail), detail["loc"]
        if _mapping_branch(values, detail):
            narrowed.append({**detail, "loc": (*inner, *loc[len(inner) + 1 :])})
        elif len(inner) == len(loc) or inner not in branches:
            narrowed.append(detail)
    return _narrowed(values, narrowed)


def _mapping_branch(values: Any, detail: Mapping[str, Any]) -> bool:
    """Whether a mistake is in a union's branch for mappings, and the value is a mapping."""
    inner = _inside(values, detail)
    if len(inner) == len(detail["loc"]):
        return False
    for part in inner:
        values = values[part]
    branch = str(detail["loc"][len(inner)])
    return isinstance(values, dict) and (branch.startswith(("dict[", "function-")) or branch[:1].isupper())


def _inside(values: Any, detail: Mapping[str, Any]) -> Place:
    """The part of a mistake's location that is in the file: pydantic adds the branches of unions."""
    loc = detail["loc"]
    for n, part in enumerate(loc[:-1] if detail["type"] == "missing" else loc):
        try:
            values = values[part]
        except (LookupError, TypeError):
            return loc[:n]
    return loc


def _explain(cls: type[BaseModel], detail: Mapping[str, Any], inner: Place, values: Mapping[str, Any]) -> str:
    if len(inner) < len(detail["loc"]):  # no branch of the union fits: one sentence for all of them
        value: Any = values
        for part in inner:
            value = value[part]
        owner = _settings_at(cls, inner[:-1])
        return f"expected {_wanted(_annotation(owner, str(inner[-1])))}, found {_shown(value)}"
    if detail["type"] == "extra_forbidden":
        known = _keys(_settings_at(cls, detail["loc"][:-1]))
        return f"unknown key{_nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error" and isinstance(detail["input"], dict):  # of the settings as a whole
        return detail["msg"].removeprefix("Value error, ")
    message = TYPES.get(detail["type"]) or detail["msg"].removeprefix("Value error, ").replace(
        "Input should be", "expected"
    )
    return f"{message}, found {_shown(detail['input'])}"


def _annotation(cls: type[BaseModel], name: str) -> Any:
    """The type of a setting, or of those that have names of the user's."""
    if field := cls.model_fields.get(name):
        return field.annotation
    return get_args(get_type_hints(cls)["__pydantic_extra__"])[1] if cls.model_config.get("extra") == "allow" else None


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _wanted(annotation: Any) -> str:
    """A field's type in words: `'auto', an integer >= 1 or [min, max]`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule for extra in args[1:] for rule in getattr(extra, "metadata", ())]
        bounds = [
            f" {sign} {getattr(rule, name):g}"
            for rule in rules
            for name, sign in {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}.items()
            if hasattr(rule, name)
        ]
        return _wanted(args[0]) + " and".join(bounds)
    if annotation is bool or origin in (Literal, Union, UnionType):
        return _either(_choices(annotation))
    if origin is list:
        return f"a list of {_wanted(args[0]).split(' ', 1)[-1]}s"
    if origin is tuple:
        return "[min, max]"
    if origin is dict:
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping of {', '.join(f'`{name}`' for name in _keys(annotation))}"
    return {str: "a string", int: "an integer", float: "a number"}.get(annotation, str(annotation))


def _keys(cls: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in cls.model_fields.items()]


def _choices(annotation: Any) -> list[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return [word for branch in args for word in _choices(branch)]
    if origin is Literal:
        return [repr(value) for value in args]
    return ["true", "false"] if annotation is bool else [_wanted(annotation)]


def _either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _settings_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    """The class of the settings at `loc`: follow the fields down, through dicts of settings."""
    for part in loc:  # a key of a dict such as `features: {NAME: ...}` has no annotation
        cls = next(_models_in(_annotation(cls, str(part))), cls)
    return cls


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


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
