"""The words of the demo world: names of shapes, colours and backgrounds, class labels, prompts and captions."""

from __future__ import annotations

from typing import Literal

PromptStyle = Literal["template", "definition", "name_is_definition"]
PROMPT_STYLES: tuple[PromptStyle, ...] = ("template", "definition", "name_is_definition")
TEMPLATE = "a photo of a {}"

SHAPE_DEFINITIONS: dict[str, str] = {
    "circle": "a round disc without corners",
    "square": "a shape with four equal sides",
    "triangle": "a shape with three corners",
    "star": "a shape with five points",
    "cross": "a shape like a plus sign",
    "ring": "a round band with a hole",
    "heart": "a shape that stands for love",
    "crescent": "a shape like a young moon",
}
COLOUR_DEFINITIONS: dict[str, str] = {
    "red": "the colour of blood",
    "orange": "the colour of carrots",
    "yellow": "the colour of lemons",
    "green": "the colour of grass",
    "cyan": "the colour of a swimming pool",
    "blue": "the colour of the deep sea",
    "pink": "the colour of bubble gum",
    "white": "the colour of snow",
}
SHAPES: tuple[str, ...] = tuple(SHAPE_DEFINITIONS)
COLOURS: tuple[str, ...] = tuple(COLOUR_DEFINITIONS)
GROUNDS: tuple[str, ...] = ("gray", "black", "brown", "navy", "olive", "teal", "maroon", "beige")
PATTERNS: tuple[str, ...] = ("plain", "shaded", "striped", "checkered", "dotted", "cloudy")
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted")
SIZES: tuple[str, ...] = ("small", "large")


def class_labels() -> tuple[str, ...]:
    """All 64 class labels, `<colour> <shape>`, in a fixed order (colour by colour)."""
    return tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


def definition(label: str) -> str:
    """What a label means, without its name: ``red circle`` → ``a round disc ... in the colour of blood``."""
    colour, shape = label.split(" ")
    return f"{SHAPE_DEFINITIONS[shape]} in {COLOUR_DEFINITIONS[colour]}"


def class_prompt(label: str, style: PromptStyle) -> str:
    """The text that stands for a class in one of the three prompt styles."""
    if style == "template":
        return TEMPLATE.format(label)
    if style == "definition":
        return definition(label)
    return f"{label} is {definition(label)}"


def with_article(phrase: str) -> str:
    """``red circle`` → ``a red circle``, ``orange star`` → ``an orange star``."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def scene_captions(label: str, *, size: str, texture: str, ground: str, pattern: str) -> tuple[str, ...]:
    """Captions of a scene with one thing: the one to search with, a short one and a full one."""
    textured = label if texture == "plain" else f"{texture} {label}"
    return (
        f"a {size} {label} on {with_article(ground)} background",
        with_article(label),
        f"a {size} {textured} on a {pattern} {ground} background",
    )


def group_captions(labels: tuple[str, ...], *, ground: str) -> tuple[str, ...]:
    """Captions of a scene with several things, named in reading order (left to right)."""
    named = [with_article(label) for label in labels]
    listed = ", ".join(named[:-1]) + " and " + named[-1]
    return (f"{listed} on {with_article(ground)} background", listed)


def word_captions(word: str, *, ground: str) -> tuple[str, ...]:
    """Captions of an image that shows nothing but a written word."""
    sign = f"a sign that says {word}"
    return (sign, with_article(word), f"{sign} on {with_article(ground)} background")
