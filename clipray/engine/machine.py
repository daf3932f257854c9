"""What a Ray that starts on this machine needs: a short path for its sockets, a token, and room on its disks."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from clipray.errors import PlanError
from clipray.storage.environment import need_room

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # of the path of a socket, in any Unix
SESSION = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
ROOM_BYTES = 128 * 2**20  # for Ray's logs and what it spills; with less, its workers fail without a word
FULL_BYTES = 16 * 2**20  # of a disk that is full, as a cause


@contextlib.contextmanager
def ready_for_ray(say: Callable[[str], None]) -> Iterator[None]:
    """A Ray that starts within the block finds a place for its files and a token.

    Raises:
        PlanError: the folder that RAY_TMPDIR names is too long a path. RunError: there is too little room in it.
    """
    before = os.environ.get("RAY_TMPDIR")
    folder = _short(temporary_folder(), say)
    need_room(folder, "Ray's temporary folder (RAY_TMPDIR, or TMPDIR)", ROOM_BYTES)
    if _token_is_lacking():
        # Of this process and its children alone; authentication stays on.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        os.environ.pop("RAY_TMPDIR") if before is None else os.environ.update(RAY_TMPDIR=before)


def temporary_folder() -> str:
    """Where a Ray that is started here keeps its sessions, but for their folder `ray`."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def full_places() -> list[str]:
    """Of the disks on which workers rest, those that are full now."""
    places = {"/dev/shm": "/dev/shm (shared memory)", temporary_folder(): f"{temporary_folder()} (temporary files)"}
    full = []
    for folder, name in places.items():
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free < FULL_BYTES:
                full.append(name)
    return full


def _short(folder: str, say: Callable[[str], None]) -> str:
    """`folder`, or /tmp where the sockets in it would have too long a path."""
    room = SOCKET_BYTES - len(SESSION)
    if len(os.fsencode(os.path.abspath(folder))) <= room:
        return folder
    if os.environ.get("RAY_TMPDIR") or not os.access("/tmp", os.W_OK):
        raise PlanError(f"{folder}: too long for the sockets of Ray; set RAY_TMPDIR to a path of at most {room} bytes")
    say("TMPDIR is too long a path for the sockets of Ray, which uses /tmp instead; RAY_TMPDIR sets another")
    return "/tmp"


def _token_is_lacking() -> bool:
    """Whether Ray would want to write a token where it cannot: in a container, a home may not be ours."""
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return False
    try:
        home = Path.home() / ".ray"
    except RuntimeError:  # nobody knows of one
        return True
    if (home / "auth_token").is_file():
        return not os.access(home / "auth_token", os.R_OK)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        return True
    return not os.access(home, os.W_OK)
