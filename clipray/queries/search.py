"""`clipray search RUN QUERY`: searches an index by one text, image or row, without Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipray.errors import JobError, ManifestError
from clipray.job import Model
from clipray.queries.searcher import Hit, Part, Searcher
from clipray.storage.environment import environment_errors


@dataclass(frozen=True)
class Answer:
    """The hits, nearest first, with the index and its metric."""

    hits: list[Hit]
    index: str
    metric: str


@environment_errors()
def search(
    run: str, text: str | None = None, *, image: str | None = None, like: str | None = None, index: str | None = None,
    by_region: bool = False, top: int = 12, model: Model | None = None,
) -> Answer:  # fmt: skip
    """Search an index of the run at `run`.

    Args:
        text, image, like: the query, one of them: words, the path or URL of an image, or the id of an indexed row.
        index: the index's table; by default the only one. by_region: the only one over regions.
        model: that of the index, where its record does not say where to find it.

    Raises:
        JobError: not one query; no such index, or more than one.
        SchemaError: the index is stale, or holds vectors that texts and images cannot be compared with.
        ModelError, ManifestError: the model or the image cannot be had.
    """
    queries = [query for query in (text, image, like) if query is not None]
    if len(queries) != 1 or not queries[0].strip():
        raise JobError("expected one query: words, --image PATH or --like ID")
    searcher = Searcher(run, index, by_region=by_region, model=model, precision="fp32")
    vector = _vector(searcher, Part(text=text, image=image, like=like))
    scores, numbers = searcher.search(vector, top, leave_out=[] if like is None else [like])
    return Answer(searcher.hits(scores[0], numbers[0]), searcher.name, searcher.metric)


def _vector(searcher: Searcher, part: Part) -> np.ndarray:
    """The vector (d,) of a part; an error about it names its option."""
    if part.like is None:
        searcher.encoder.resolved()  # an error about the model names none
    option = "--like " if part.like is not None else "--image " if part.image is not None else ""
    try:
        return searcher.vector([part])
    except (JobError, ManifestError) as error:
        raise type(error)(f"{option}{error}") from error
