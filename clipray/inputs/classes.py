"""Classes and their prompts, from a job, a file or a built-in list: names, templates, descriptions."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from clipray.analysis.prompts import PHOTO_TEMPLATES, PromptStyle
from clipray.errors import JobError, ManifestError
from clipray.inputs.class_lists import cifar100, imagenet, openai_templates
from clipray.inputs.parquet_files import as_utf8, expand_parquet, is_text, read_footer, with_rows
from clipray.job import CLASS_SETS, Classes, Style, distinct
from clipray.job.plain_yaml import load_yaml, read_text
from clipray.storage.folder import absolute

TEMPLATE = "a photo of a {}"
KNOWN_SUFFIXES = (".yaml", ".yml", ".json", ".parquet", ".pq", ".csv", ".txt")
"""Suffixes of class files."""
LARGEST_BYTES = 16 * 2**20  # of a text class file; ten descriptions of each of 20,000 classes take a quarter of it
CLASS_COLUMNS = ("label", "style", "prompt", "description")
KINDS = ("template", "description", "name_is_description")
PromptSet = str | list[str]


def prompt_styles(
    classes: str | list[str] | Classes, styles: Sequence[str] | Mapping[str, Style] | None = None
) -> list[PromptStyle]:
    """The prompts of each class, in each style.

    Args:
        classes: a YAML, CSV or Parquet file, a text file with a name a line, a built-in list, names, or `Classes`.
        styles: by name, or names of kinds of prompts; None: `template`, or all styles that a Parquet or CSV file holds.

    Raises:
        JobError: with the file, what was expected and what was found.
        ManifestError: no such file.
    """
    if isinstance(classes, str) and classes.lower().endswith((".parquet", ".pq", ".csv")):
        data = _read_csv(classes) if classes.lower().endswith(".csv") else _read_parquet(classes)
        if "prompt" in data.column_names:
            return _stored_styles(classes, data, styles)
        known = _classes_of(classes, data)
    else:
        known = _known(classes)
    if styles is None or not isinstance(styles, Mapping):
        wrong = [name for name in styles or () if name not in KINDS]
        if wrong:
            raise JobError(
                f"style {wrong[0]!r}: expected {', '.join(KINDS)}, or a mapping `{{{wrong[0]}: {{prompt: …}}}}`"
            )
        styles = {name: Style(prompt=name) for name in styles or ("template",)}  # type: ignore[arg-type]
    return [_style(name, style, known) for name, style in styles.items()]


def _style(name: str, style: Style, classes: Classes) -> PromptStyle:
    labels = tuple(classes.names)
    if style.prompt == "template":
        return PromptStyle(name, labels, templates=_templates(style.templates or classes.templates or TEMPLATE))
    descriptions = style.descriptions if style.descriptions is not None else classes.descriptions
    where = f"style {name}"
    if isinstance(descriptions, str):
        where, descriptions = f"style {name}: {descriptions}", _descriptions(descriptions)
    if not descriptions:
        raise JobError(f"{where}: `prompt: {style.prompt}` needs `descriptions`, a text for each class")
    missing, unknown = [n for n in labels if not descriptions.get(n)], [n for n in descriptions if n not in labels]
    if missing or unknown:
        what = f"no description of {_listed(missing)}" if missing else f"descriptions of no class: {_listed(unknown)}"
        raise JobError(f"{where}: {what}")
    texts = tuple(tuple(_texts(descriptions[label])) for label in labels)
    return PromptStyle(name, labels, descriptions=texts, named=style.prompt == "name_is_description")


def _templates(templates: PromptSet) -> tuple[str, ...]:
    if isinstance(templates, str):
        sets = {"photo": lambda: PHOTO_TEMPLATES, "openai": openai_templates}
        return tuple(sets[templates]()) if templates in sets else (templates,)
    return tuple(templates)


def _texts(prompts: PromptSet) -> list[str]:
    return [prompts] if isinstance(prompts, str) else prompts


def _known(classes: str | list[str] | Classes) -> Classes:
    if isinstance(classes, Classes):
        return classes
    if isinstance(classes, list):
        return Classes(names=classes)
    if classes in CLASS_SETS:
        return Classes(names=cifar100() if classes == "cifar100" else imagenet())
    if classes.lower().endswith((".yaml", ".yml", ".json")):
        values = _read_yaml(classes)
        return _validated(classes, values if isinstance(values, dict) else {"names": values})
    if classes.lower().endswith(".txt"):
        lines = [line.strip() for line in _read(classes).splitlines()]
        return _validated(classes, {"names": [line for line in lines if line]})
    raise JobError(
        f"classes {classes!r}: expected a file ({', '.join(KNOWN_SUFFIXES)}), {' or '.join(CLASS_SETS)}, or a list of names"
    )


def _validated(path: str, values: Mapping[str, Any]) -> Classes:
    try:
        return Classes(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][:2]))
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        raise JobError(f"{path}: {place}: {message}; a class file has `names`, `templates`, `descriptions`") from error


def _read(path: str) -> str:
    try:
        return read_text(absolute(path), LARGEST_BYTES)
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: no such class file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _read_yaml(path: str) -> Any:
    return load_yaml(_read(path), path)[0]


def _descriptions(path: str) -> dict[str, PromptSet]:
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise JobError(f"{path}: expected a mapping of class names to descriptions, found {type(values).__name__}")
    return _validated(path, {"names": list(map(str, values)), "descriptions": values}).descriptions or {}


def _read_parquet(path: str) -> pa.Table:
    """The text columns of a Parquet file, glob or folder of classes."""
    parts = []
    for file in with_rows([read_footer(url) for url in expand_parquet(absolute(path))]):
        if reason := file.without("label"):
            raise JobError(f"{file.url}: {reason}")
        named = [name for name in CLASS_COLUMNS if name in file.schema.names]
        if reason := next(filter(None, map(file.without, named)), ""):
            raise JobError(f"{file.url}: {reason}")
        try:
            data = file.whole.read(named)
        except (pa.ArrowInvalid, OSError) as error:
            raise ManifestError(f"{file.url}: not a whole Parquet file: {error}") from error
        parts.append(pa.table({name: _strings(file.url, name, data[name]) for name in named}))
    return pa.concat_tables(parts)


def _read_csv(path: str) -> pa.Table:
    """The text columns of a CSV file of classes, which has a header."""
    rows = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        names, values = list(rows.fieldnames or ()), list(rows)
    except csv.Error as error:
        raise JobError(f"{path}: not valid CSV: {error}") from error
    if names.count("label") != 1:
        raise JobError(f"{path}: expected a header with one column `label`; found: {', '.join(names)}")
    uneven = next((row for row in values if None in row or None in row.values()), None)
    if uneven is not None:
        raise JobError(
            f"{path}: the row of {uneven['label']!r} has another number of values than the header, {len(names)}"
        )
    return pa.table({name: [row[name] for row in values] for name in CLASS_COLUMNS if name in names})


def _strings(url: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not is_text(column.type):
        raise JobError(f"{url}: column {name!r}: expected strings, found {column.type}")
    if column.null_count:
        raise JobError(f"{url}: column {name!r} has {column.null_count} nulls")
    texts, broken = as_utf8(column)
    if broken.any():
        raise JobError(f"{url}: column {name!r} has {broken.sum()} strings that are not UTF-8")
    return texts


def _classes_of(path: str, data: pa.Table) -> Classes:
    values: dict[str, Any] = {"names": data["label"].to_pylist()}
    if "description" in data.column_names:
        values["descriptions"] = dict(zip(values["names"], data["description"].to_pylist(), strict=True))
    return _validated(path, values)


def _stored_styles(path: str, data: pa.Table, styles: Sequence[str] | Mapping[str, Style] | None) -> list[PromptStyle]:
    """Styles of a table with a row per `label`, `style` and `prompt`; several prompts of a class are averaged."""
    if isinstance(styles, Mapping):
        raise JobError(f"{path} holds the prompts themselves: `styles` may only name some of its styles")
    ofs = data["style"].to_pylist() if "style" in data.column_names else ["template"] * len(data)
    prompts: dict[str, dict[str, list[str]]] = {}
    for style, label, prompt in zip(ofs, data["label"].to_pylist(), data["prompt"].to_pylist(), strict=True):
        prompts.setdefault(style, {}).setdefault(label, []).append(prompt)
    unknown = [name for name in styles or () if name not in prompts]
    if unknown:
        raise JobError(f"{path}: no style {unknown[0]!r}; there are: {', '.join(prompts)}")
    chosen = []
    for name in styles or prompts:
        labels = tuple(distinct(list(prompts[name])))
        chosen.append(PromptStyle(name, labels, descriptions=tuple(tuple(prompts[name][label]) for label in labels)))
    return chosen


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
