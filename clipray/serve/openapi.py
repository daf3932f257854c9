"""The description of the JSON API, OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from clipray import __version__
from clipray.serve.images import SIDES_PX
from clipray.serve.search_request import MOST_HITS, MOST_OFFSET

STRINGS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
QUERY: dict[str, tuple[dict[str, Any], str]] = {
    "text": (STRINGS, "Words that describe what the image should show; may be repeated."),
    "minus": (STRINGS, "Words that count against an answer; may be repeated."),
    "like": (STRINGS, "Id of a row: more like this; may be repeated, for the mean of several."),
    "unlike": (STRINGS, "Id of a row that counts against an answer; may be repeated."),
    "image": (STRINGS, "Name of an uploaded image, as POST /api/images answers; may be repeated."),
    "url": (STRINGS, "URL of an image, where the server was started with --allow-urls; may be repeated."),
    "where": (
        {"type": "string"},
        "Condition on the rows' columns, an expression of SQL: label = 'cat' and width > 500.",
    ),
    "column": (STRINGS, "Column to answer with; may be repeated. By default the columns that the job kept."),
    "top": ({"type": "integer", "minimum": 1, "maximum": MOST_HITS, "default": 24}, "Number of answers."),
    "offset": ({"type": "integer", "minimum": 0, "maximum": MOST_OFFSET, "default": 0}, "Answers to leave out first."),
    "index": ({"type": "string"}, "Table of the index, where a run has several."),
    "run": ({"type": "string"}, "Name of the run, where the server has several; by default the first."),
}
HIT = {
    "type": "object",
    "description": "An answer, with the values of its columns.",
    "required": ["image_id", "score", "rank"],
    "additionalProperties": True,
    "properties": {
        "image_id": {"type": "string"},
        "score": {
            "type": ["number", "null"],
            "description": "By the index's metric; null where nothing was looked for.",
        },
        "rank": {"type": "integer", "minimum": 1},
        "region_id": {"type": "string"},
        "box_xyxy": {"type": ["array", "null"], "items": {"type": "number"}, "description": "In px of the image."},
    },
}
ANSWER = {
    "type": "object",
    "required": ["hits"],
    "properties": {
        "hits": {"type": "array", "items": {"$ref": "#/components/schemas/Hit"}},
        "run": {"type": "string"},
        "index": {"type": "string"},
        "metric": {"enum": ["cosine", "dot", "l2"], "description": "By l2 the least score is the nearest."},
        "matching": {"type": "integer", "description": "Rows that match `where`."},
        "rows": {"type": "integer", "description": "Rows of the index."},
        "seconds": {"type": "number"},
    },
}


def openapi() -> dict[str, Any]:
    """The description as JSON values."""
    one = {
        "type": "object",
        "additionalProperties": False,
        "properties": {n: schema for n, (schema, _) in QUERY.items()},
    }
    answers = {
        "type": "object",
        "properties": {"answers": {"type": "array", "items": {"$ref": "#/components/schemas/Answer"}}},
    }
    batch = {
        "type": "object",
        "properties": {"queries": {"type": "array", "items": {"$ref": "#/components/schemas/Query"}}},
    }
    either = {"oneOf": [{"$ref": "#/components/schemas/Answer"}, answers]}
    asked = {"oneOf": [{"$ref": "#/components/schemas/Query"}, batch]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "clipray", "version": __version__, "summary": "Search and browse the tables of a run."},
        "components": {"schemas": {"Query": one, "Hit": HIT, "Answer": ANSWER}},
        "paths": {
            "/api/search": {
                "get": _operation("Search, or list the rows that match a condition", {"$ref": "#/components/schemas/Answer"}, _query()),
                "post": {
                    **_operation("Search with one query, or with several at once", either),
                    "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
                },
            },
            "/api/facets": {"get": _operation("Values of columns with their counts, and ranges of numbers", {"type": "object"}, _query())},
            "/api/export": {"get": _operation("What a search finds, as a file", None, [*_query(), _parameter("format", {"enum": ["csv", "parquet", "manifest"]}, "Type of the file.")])},
            "/api/rows/{id}": {"get": _operation("Everything that the tables say of a row; its id may contain slashes", {"type": "object"}, [_id(), *_query("run")])},
            "/api/images": {
                "post": {
                    **_operation("Upload an image, to search with it", {"type": "object", "properties": {"image": {"type": "string"}}}, status="201"),
                    "requestBody": {"required": True, "content": {"image/*": {}, "application/octet-stream": {}}},
                }
            },
            "/api/status": {"get": _operation("The runs, their tables, and whether they answer to words", {"type": "object"})},
            "/thumbnail/{id}": {
                "get": _operation("The image of a row as WebP", None, [_id(), *_query("run"), _parameter("size", {"enum": list(SIDES_PX)}, "Longest side in px."), _parameter("region", {"type": "string"}, "Id of a region, whose box is drawn.")])
            },
        },
    }  # fmt: skip


def _query(*names: str) -> list[dict[str, Any]]:
    return [_parameter(name, *QUERY[name]) for name in (names or QUERY)]


def _parameter(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _id() -> dict[str, Any]:
    return {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}, "description": "Id of the row."}


def _operation(
    summary: str, schema: dict[str, Any] | None, parameters: list[dict[str, Any]] | None = None, status: str = "200"
) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": schema}}} if schema is not None else {}
    error = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}
    responses = {
        status: {"description": "The answer.", **content},
        "4XX": {"description": "Why not, in one line.", "content": error},
    }
    return {"summary": summary, "parameters": parameters or [], "responses": responses}
