"""The socket by which commands of the same user ask a running server: one for each run, in a folder that is theirs alone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

BACKLOG = 64
CONNECT_S, ANSWER_S = 0.3, 60.0


def sockets_folder() -> Path:
    """The folder of this user's sockets: in the runtime directory of the session, else a private one for temporary files."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isdir(runtime):
        return Path(runtime) / "clipray"
    return Path(tempfile.gettempdir()) / f"clipray-{os.getuid()}"


def socket_path(run_url: str) -> Path:
    """The socket of the server of a run, by the absolute path or URL of the run's folder."""
    return sockets_folder() / f"{hashlib.sha256(run_url.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.sock"


@contextlib.contextmanager
def listening_socket(run_url: str, say: Callable[[str], None]) -> Iterator[socket.socket | None]:
    """The run's socket, mode 0600; None where another server has it, or none can be made. It is removed in the end."""
    path = socket_path(run_url)
    listener = None
    try:
        listener = _bound(path)
    except OSError as error:
        say(f"commands will not use this server: {path}: {error.strerror or error}")
    if listener is None:
        yield None
        return
    with listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _bound(path: Path) -> socket.socket | None:
    """Raises OSError: the folder cannot be made, or is somebody else's."""
    if not hasattr(socket, "AF_UNIX"):
        return None
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_private(path.parent):
        raise PermissionError(13, "expected a folder of this user alone")
    if path.exists():
        if _answers(path):
            return None
        path.unlink()  # of a server that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def is_private(folder: Path) -> bool:
    """Whether the folder is this user's, and nobody else may look into it."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class LocalConnection(http.client.HTTPConnection):
    """A connection to a server's local socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_S)
        self.sock.connect(str(self._path))
        self.sock.settimeout(ANSWER_S)
