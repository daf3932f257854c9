"""Built-in names of classes and templates: CIFAR-100's names here, ImageNet's as open_clip has them."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

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
    names = [ast.literal_eval(node) for node in _listed("IMAGENET_CLASSNAMES")]
    return [OTHER_WORDS.get((n, name), name) for n, name in enumerate(names)]


def openai_templates() -> list[str]:
    """OpenAI's 80 templates for ImageNet, with `{}` in place of the name."""
    return ["".join(_text(part) for part in node.body.values) for node in _listed("OPENAI_IMAGENET_TEMPLATES")]  # type: ignore[attr-defined]


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "{}"


@functools.cache
def _listed(name: str) -> list[ast.expr]:
    """The items of a list in open_clip's package data, parsed and not imported: open_clip imports torch."""
    package = importlib.util.find_spec("open_clip")
    path = Path(str(package.origin if package else "")).parent / "zero_shot_metadata.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return list(node.value.elts)  # type: ignore[attr-defined]
    raise AssertionError(f"{path} has no {name}")
