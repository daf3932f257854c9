"""Asks the running server of a run over its local socket, so that a command need not load a model. Imports little."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipray import __version__, errors
from clipray.serve.local_socket import LocalConnection, is_private, socket_path, sockets_folder

NOT_HERE = 404, 409  # no such address, or another version


def ask_server_of(run_url: str, path: str, request: dict[str, Any]) -> Any | None:
    """What the server of the run at this absolute path or URL answers; None where there is none, or it cannot.

    Raises:
        ClipRayError: what the server raised.
    """
    return _ask(socket_path(run_url), path, request)


def ask_any_server(path: str, request: dict[str, Any]) -> Any | None:
    """The answer of the first of this user's servers that has one."""
    answers = (_ask(socket, path, request) for socket in _sockets())
    return next((answer for answer in answers if answer is not None), None)


def _sockets() -> Iterator[Path]:
    folder = sockets_folder()
    yield from sorted(folder.glob("*.sock")) if folder.is_dir() else ()


def _ask(socket: Path, path: str, request: dict[str, Any]) -> Any | None:
    if not socket.exists() or not is_private(socket.parent):
        return None
    connection = LocalConnection(socket)
    try:
        connection.request("POST", path, json.dumps({"version": __version__, **request}).encode())
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException):  # it ends just now, or is none of ours
        return None
    finally:
        connection.close()
    if response.status in NOT_HERE:
        return None
    if response.status != 200:
        raise _error(answer)
    return answer


def _error(answer: Any) -> errors.ClipRayError:
    """The server's error, of its own class, which has the exit code."""
    named: Any = getattr(errors, str(answer.get("type")), errors.ClipRayError)
    return named(str(answer.get("error")))
