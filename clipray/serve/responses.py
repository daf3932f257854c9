"""Answers of the server: JSON of any value of a table, and errors as JSON or as a page."""

from __future__ import annotations

import base64
import json
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from http import HTTPStatus
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from clipray.errors import ClipRayError, DamagedError, ManifestError, ModelError, SchemaError, StaleTableError
from clipray.serve.templating import render


class HttpError(ClipRayError):
    """An answer that is no success. status: of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Json(JSONResponse):
    """JSON of values as tables have them: dates as ISO 8601, bytes as base64, and null for numbers that are not finite."""

    def render(self, content: Any) -> bytes:
        return json.dumps(plain(content), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def plain(value: Any) -> Any:
    """A value of a table as JSON has it."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return str(value) if isinstance(value, timedelta | Decimal) else value


def status_of(error: ClipRayError) -> int:
    """The status of HTTP for an error of ours."""
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, DamagedError | StaleTableError):
        return HTTPStatus.CONFLICT
    if isinstance(error, SchemaError | ModelError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return HTTPStatus.UNPROCESSABLE_ENTITY if isinstance(error, ManifestError) else HTTPStatus.BAD_REQUEST


def error_response(path: str, error: ClipRayError) -> Response:
    """An error in one line: as JSON to programs, else as a page."""
    status, text = status_of(error), str(error)
    if path.startswith(("/api/", "/thumbnail/", "/image/")):
        return Json({"error": text}, status)
    title = HTTPStatus(status).phrase
    return Response(render("error.html", title=title, text=text), status, media_type="text/html")


async def on_error(request: Request, error: Exception) -> Response:
    """A handler of Starlette's for errors of ours."""
    assert isinstance(error, ClipRayError)
    return error_response(request.url.path, error)
