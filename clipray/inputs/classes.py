"""Classes and their prompts, from a job, a file or a built-in list: names, templates, descriptions."""

from __future__ import annotations

import ast
import csv
import functools
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from clipray.analysis.prompts import PHOTO_TEMPLATES, PromptStyle
from clipray.errors import JobError, ManifestError
from clipray.inputs.parquet_files import open_files, read_texts
from clipray.job import CLASS_SETS, Classes, Style, distinct
from clipray.job.plain_yaml import load_yaml, read_text

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
    texts = tuple((text,) if isinstance(text := descriptions[label], str) else tuple(text) for label in labels)
    return PromptStyle(name, labels, descriptions=texts, named=style.prompt == "name_is_description")


def _templates(templates: PromptSet) -> tuple[str, ...]:
    if isinstance(templates, str):
        sets = {"photo": lambda: PHOTO_TEMPLATES, "openai": openai_templates}
        return tuple(sets[templates]()) if templates in sets else (templates,)
    return tuple(templates)


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
    return read_text(path, "class file", ManifestError, LARGEST_BYTES)


def _read_yaml(path: str) -> Any:
    return load_yaml(_read(path), path)[0]


def _descriptions(path: str) -> dict[str, PromptSet]:
    values = _read_yaml(path)
    if not isinstance(values, dict):
        raise JobError(f"{path}: expected a mapping of class names to descriptions, found {type(values).__name__}")
    return _validated(path, {"names": list(map(str, values)), "descriptions": values}).descriptions or {}


def _read_parquet(path: str) -> pa.Table:
    """The text columns of a Parquet file, glob or folder of classes."""
    files = open_files(path)
    return read_texts(files, ["label", *(name for name in CLASS_COLUMNS[1:] if name in files[0].schema.names)])


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


# Krizhevsky 2009, "Learning multiple layers of features from tiny images", table of classes; in alphabetical order.
CIFAR100 = """
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus, butterfly, camel, can,
castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup, dinosaur, dolphin,
elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion, lizard, lobster,
man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree, pear, pickup truck,
pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea, seal, shark, shrew, skunk,
skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper, table, tank, telephone, television, tiger,
tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
"""

# Two names occur twice in that list; these are other words of the same WordNet synsets.
OTHER_WORDS = {(744, "missile"): "projectile", (836, "sunglasses"): "sunglass"}


def cifar100() -> list[str]:
    """CIFAR-100's hundred names."""
    return [name.strip() for name in CIFAR100.split(",")]


def imagenet() -> list[str]:
    """ImageNet's thousand names, in the order of its classes."""
    names = [ast.literal_eval(node) for node in _open_clip_list("IMAGENET_CLASSNAMES")]
    return [OTHER_WORDS.get((n, name), name) for n, name in enumerate(names)]


def openai_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet, with `{}` in place of the name."""
    nodes = _open_clip_list("OPENAI_IMAGENET_TEMPLATES")
    return ["".join(map(_template_part, node.body.values)) for node in nodes]  # type: ignore[attr-defined]


def _template_part(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


@functools.cache
def _open_clip_list(name: str) -> list[ast.expr]:
    """The items of a list in open_clip's package data, parsed and not imported: open_clip imports torch."""
    package = importlib.util.find_spec("open_clip")
    path = Path(str(package.origin if package else "")).parent / "zero_shot_metadata.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return list(node.value.elts)  # type: ignore[attr-defined]
    raise AssertionError(f"{path} has no {name}")
