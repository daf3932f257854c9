"""Search and labels for the command line: by the running server of the run, which has the model in memory, or else here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clipray.queries.answer import Answer, Hit, Look
from clipray.serve.local_client import ask_any_server, ask_server_of
from clipray.storage.folder import absolute

if TYPE_CHECKING:
    from clipray.job import Model


def search(run: str, text: str | None = None, *, model: Model | None = None, **query: Any) -> Answer:
    """As `queries.search.search`."""
    if model is None:
        images = [absolute(image) for image in query.get("image") or ()]
        answer = ask_server_of(
            absolute(run), "/local/search", {"run": absolute(run), "text": text, **query, "image": images}
        )
        if answer is not None:
            return Answer([_hit(hit) for hit in answer["hits"]], answer["index"], answer["metric"])
    from clipray.queries.search import search as search_here

    return search_here(run, text, model=model, **query)


def label(images: Sequence[str], classes: str, model: Model, *, template: str | None, top: int) -> Iterator[Look]:
    """As `queries.label.label`."""
    if all(map(os.path.isfile, images)):  # others are listed here, where the names of files are relative to
        settings = {"name": model.name, "pretrained": model.pretrained, "seed": model.seed}
        named = os.path.abspath(classes) if os.path.isfile(classes) else classes
        request = {"images": [*map(os.path.abspath, images)], "classes": named, "template": template, "top": top}
        answers = ask_any_server("/local/label", {"model": settings, **request})
        if answers is not None:
            return (_look(name, answer) for name, answer in zip(images, answers, strict=True))
    from clipray.queries.label import label as label_here

    return label_here(images, classes, model, template=template, top=top)


def _hit(values: dict[str, Any]) -> Hit:
    return Hit(**{**values, "box": None if values["box"] is None else tuple(values["box"])})


def _look(name: str, values: dict[str, Any]) -> Look:
    labels = tuple((label, probability) for label, probability in values["labels"])
    return Look(name, labels, values["rejected"])
