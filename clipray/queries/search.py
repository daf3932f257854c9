"""`clipray search RUN QUERY`: searches an index by words, images or rows, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipray.errors import JobError, ManifestError
from clipray.job import Model
from clipray.queries.answer import Answer
from clipray.queries.searcher import Part, Searcher
from clipray.storage.environment import environment_errors


@environment_errors()
def search(
    run: str | Searcher, text: str | None = None, *, image: str | Sequence[str] | None = None,
    like: str | Sequence[str] | None = None, minus: Sequence[str] = (), where: str | None = None,
    columns: Sequence[str] = (), index: str | None = None, by_region: bool = False, top: int = 12,
    model: Model | None = None,
) -> Answer:  # fmt: skip
    """Search an index of the run at `run`, or one that is open, which has its index and model already.

    Args:
        text, image, like: the query: words, paths or URLs of images, ids of indexed rows, or a mixture of these.
        minus: words that the answers should not be like.
        where: a filter, such as `label = 'cat' and width > 500`; see `RowColumns`.
        columns: whose values hits should have.
        index: the index's table; by default the only one. by_region: the only one over regions.
        model: that of the index, where its record does not say where to find it.

    Raises:
        JobError: no query; no such index, or more than one; no such column, or `where` is no filter.
        SchemaError: the index is stale, or holds vectors that texts and images cannot be compared with.
        ModelError, ManifestError: the model or an image cannot be had.
    """
    likes = _listed(like)
    parts = [Part(text=value) for value in _listed(text)] + [Part(image=value) for value in _listed(image)]
    parts += [Part(like=value) for value in likes]
    if not parts or not all(value.strip() for value in (*_listed(text), *_listed(image), *likes, *minus)):
        raise JobError("expected a query: words, --image PATH or --like ID")
    parts += [Part(-1, text=value) for value in minus]
    if isinstance(run, Searcher):
        searcher = run
    else:
        searcher = Searcher(run, index, by_region=by_region, model=model, precision="fp32")
    mask = None if where is None else searcher.columns.mask(where)
    scores, numbers = searcher.search(_vector(searcher, parts), top, mask, leave_out=likes)
    return Answer(searcher.hits(scores[0], numbers[0], columns), searcher.name, searcher.metric)


def _listed(values: str | Sequence[str] | None) -> list[str]:
    return [] if values is None else [values] if isinstance(values, str) else list(values)


def _vector(searcher: Searcher, parts: Sequence[Part]) -> np.ndarray:
    """The vector (d,) of a query; an error about an image or a row names its option."""
    if any(part.like is None for part in parts):
        searcher.encoder.resolved()  # an error about the model names none
    try:
        return searcher.vector(parts)
    except (JobError, ManifestError) as error:
        values = [("--like ", part.like) for part in parts] + [("--image ", part.image) for part in parts]
        option = next((option for option, value in values if value and str(error).startswith(f"{value!s}: ")), "")
        raise type(error)(f"{option}{error}") from error
