"""What a client searches for: read from an address or from JSON, and answered."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from starlette.datastructures import QueryParams

from clipray.errors import JobError, listed
from clipray.queries.answer import Hit
from clipray.queries.searcher import Part
from clipray.serve.responses import HttpError
from clipray.serve.state import ServedRun
from clipray.serve.uploads import Uploads

MOST_HITS, MOST_OFFSET, MOST_PARTS, MOST_CHARACTERS = 1_000, 10_000, 64, 2_000
LISTS = ("text", "minus", "like", "unlike", "image", "url", "column")
WORDS = ("where", "index", "run")
NUMBERS = ("top", "offset")


@dataclass(frozen=True)
class SearchRequest:
    """A query. Without any part it lists the rows that match `where`, in the order of the index.

    Attributes:
        text, like, image, url: what is looked for, all of it at once: words, ids of rows, names of uploaded images, URLs.
        minus, unlike: words and ids of rows that count against an answer.
        where: a condition on the rows' columns; see `clipray search --where`.
        column: columns to answer with; empty: the columns that were kept.
    """

    text: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    like: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    url: tuple[str, ...] = ()
    column: tuple[str, ...] = ()
    where: str = ""
    index: str = ""
    run: str = ""
    top: int = 24
    offset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top <= MOST_HITS:
            raise JobError(f"top: expected 1 to {MOST_HITS}, found {self.top}")
        if not 0 <= self.offset <= MOST_OFFSET:
            raise JobError(f"offset: expected 0 to {MOST_OFFSET}, found {self.offset}; narrow the query instead")
        parts = [*self.text, *self.minus, *self.like, *self.unlike, *self.image, *self.url]
        if len(parts) > MOST_PARTS:
            raise JobError(f"expected at most {MOST_PARTS} parts of a query, found {len(parts)}")
        for part in (*parts, self.where):
            if len(part) > MOST_CHARACTERS:
                raise JobError(f"expected at most {MOST_CHARACTERS} characters, found {len(part)}: {part[:40]!r}…")

    @classmethod
    def of_query(cls, query: QueryParams) -> SearchRequest:
        """From an address. Words that are empty are left out. Raises JobError: a number that is none."""
        fields: dict[str, Any] = {n: tuple(v for v in query.getlist(n) if v.strip()) for n in LISTS}
        fields |= {name: query.get(name, "").strip() for name in WORDS}
        fields |= {name: _number(name, query[name]) for name in NUMBERS if query.get(name)}
        return cls(**fields)

    @classmethod
    def of_json(cls, values: object) -> SearchRequest:
        """From a JSON object; each list may be a single string. Raises JobError: an unknown key, or another type."""
        if not isinstance(values, Mapping):
            raise JobError(f"expected an object with a query, found {type(values).__name__}")
        unknown = [str(name) for name in values if name not in (*LISTS, *WORDS, *NUMBERS)]
        if unknown:
            raise JobError(f"unknown {listed(unknown)}; expected {', '.join((*LISTS, *WORDS, *NUMBERS))}")
        fields: dict[str, Any] = {}
        for name, value in values.items():
            if name in LISTS:
                fields[name] = _strings(name, value)
            elif name in WORDS:
                (fields[name],) = _strings(name, value) or ("",)
            elif isinstance(value, int) and not isinstance(value, bool):
                fields[name] = value
            else:
                raise JobError(f"{name}: expected a whole number, found {value!r:.40}")
        return cls(**fields)

    def parts(self, uploads: Uploads, fetched: Sequence[bytes] = ()) -> list[Part]:
        """The parts of the query. fetched: the images behind `url`."""
        images = [uploads.get(name) for name in self.image]
        return [
            *(Part(1.0, text=text) for text in self.text),
            *(Part(1.0, like=name) for name in self.like),
            *(Part(1.0, image=data) for data in (*images, *fetched)),
            *(Part(-1.0, text=text) for text in self.minus),
            *(Part(-1.0, like=name) for name in self.unlike),
        ]


def answer(run: ServedRun, request: SearchRequest, parts: Sequence[Part]) -> dict[str, Any]:
    """The answer as JSON values: `hits`, nearest first, and what they are of.

    Raises:
        HttpError, ClipRayError: no such run, index or row; `where` is wrong; the index cannot be searched with words.
    """
    began = time.perf_counter()
    opened = run.searcher(request.index)
    searcher = opened.searcher
    mask = searcher.columns.mask(request.where) if request.where else None
    matching = searcher.n_rows if mask is None else int(mask.sum())
    if parts:
        if opened.problem and any(part.like is None for part in parts):
            raise HttpError(409, opened.problem)
        vector = opened.vector(parts)[None]
        leave_out = [*request.like, *request.unlike]
        scores, numbers = searcher.search(vector, request.offset + request.top, mask, leave_out=leave_out)
        kept = numbers[0] >= 0
        scores, numbers = scores[0][kept][request.offset :], numbers[0][kept][request.offset :]
    else:
        numbers = _listed(mask, searcher.n_rows, request)
        scores = np.full(len(numbers), np.nan, np.float32)
    columns = request.column or searcher.columns.columns.kept
    hits = searcher.hits(scores, numbers, columns, with_uri=False)
    return {
        "hits": [_hit(hit, request.offset) for hit in hits],
        "run": run.name,
        "index": searcher.name,
        "metric": searcher.metric,
        "matching": matching,
        "rows": searcher.n_rows,
        "seconds": round(time.perf_counter() - began, 4),
    }


def _hit(hit: Hit, offset: int) -> dict[str, Any]:
    """A hit as JSON values. Kept columns never hide what is ours."""
    ours: dict[str, Any] = {"image_id": hit.image_id, "score": hit.score, "rank": offset + hit.rank}
    if hit.region_id is not None:
        ours |= {"region_id": hit.region_id, "box_xyxy": hit.box}
    return {**hit.values, **ours}


def _listed(mask: np.ndarray | None, rows: int, request: SearchRequest) -> np.ndarray:
    """Numbers (t,) int64 of the rows that match, in the order of the index."""
    numbers = np.arange(rows) if mask is None else np.flatnonzero(mask)
    return numbers[request.offset : request.offset + request.top]


def search(run: ServedRun, request: SearchRequest, uploads: Uploads, fetched: Sequence[bytes] = ()) -> dict[str, Any]:
    """See `answer`."""
    return answer(run, request, request.parts(uploads, fetched))


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise JobError(f"{name}: expected a whole number, found {value[:40]!r}") from None


def _strings(name: str, value: object) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise JobError(f"{name}: expected a string or a list of strings, found {value!r:.40}")
    return tuple(item for item in values if item.strip())
