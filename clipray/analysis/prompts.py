"""Texts that describe a class: names in templates, or descriptions, split into lengths that a text encoder can read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a picture that shows a {}.",
    "a snapshot of the {}.",
    "a {} seen from close by.",
    "a {} in the distance.",
    "a bright photo of a {}.",
    "a photo of a {} in poor light.",
    "a blurred photo of a {}.",
    "a black and white photo of a {}.",
    "a photo of a large {}.",
    "a photo of a small {}.",
    "a photo of several of the kind {}.",
    "part of a {}.",
    "my own {}.",
)
"""General wordings of what a photo may show; `templates: photo`."""

SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+")


@dataclass(frozen=True)
class PromptStyle:
    """A style of texts for all classes. Texts are made class by class, so that 20,000 classes take no more than their names.

    Attributes:
        labels: names of the classes. templates: each name is put into each of them.
        descriptions: texts of each class, in place of templates; a long one is cut into sentences.
        named: `NAME is DESCRIPTION`.
    """

    name: str
    labels: tuple[str, ...]
    templates: tuple[str, ...] = ()
    descriptions: tuple[tuple[str, ...], ...] = ()
    named: bool = False

    def texts(self, n: int, tokens: Callable[[str], int], limit: int) -> list[str]:
        """The texts of class `n`, at least one, of at most `limit` tokens each where they are descriptions."""
        label = self.labels[n]
        if not self.descriptions:
            return [template.replace("{}", label) for template in self.templates]
        texts = [f"{label} is {text}" if self.named else text for text in self.descriptions[n]]
        return [part for text in texts for part in split(text, tokens, limit)]

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of all settings."""
        content = [self.name, self.labels, self.templates, self.descriptions, self.named]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def split(text: str, tokens: Callable[[str], int], limit: int) -> list[str]:
    """`text` whole if it has at most `limit` tokens; else its sentences, and of those that are too long their halves."""
    text = " ".join(text.split())
    if tokens(text) <= limit:
        return [text]
    return [part for sentence in SENTENCE_END.split(text) for part in _halves(sentence, tokens, limit)]


def _halves(text: str, tokens: Callable[[str], int], limit: int) -> list[str]:
    words = text.split(" ")
    if len(words) == 1 or tokens(text) <= limit:
        return [text]
    middle = len(words) // 2
    return [part for half in (words[:middle], words[middle:]) for part in _halves(" ".join(half), tokens, limit)]
