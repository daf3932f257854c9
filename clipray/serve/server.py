"""Runs the server: on a port of one address, and on a socket in the user's own folder for quick commands."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import uvicorn

from clipray.errors import JobError
from clipray.serve import app
from clipray.serve.local_socket import listening_socket
from clipray.serve.options import LOOPBACK_NAMES, ServeOptions

BACKLOG = 128
GRACE_S = 3  # for answers under way when the server stops


@dataclass(frozen=True)
class Address:
    """Where the server listens. port: 0 for any that is free."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(
    runs: Sequence[str], address: Address, options: ServeOptions, *, open_browser: bool, say: Callable[[str], None]
) -> None:
    """Serve the runs until a signal stops it.

    Args:
        say: takes the address to open, and what else a person should know.

    Raises:
        JobError: the address cannot be listened on; no run; Starlette is not installed.
    """
    if not address.is_loopback:
        options = replace(options, hosts=(), token=options.token or secrets.token_urlsafe(24))
    elif address.host not in LOOPBACK_NAMES:
        options = replace(options, hosts=(*options.hosts, address.host, f"[{address.host}]"))
    application = app(*runs, options=options)
    urls = [run.output.url for run in application.state.runs]
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(_listening(address))
        local = [s for url in urls if (s := stack.enter_context(listening_socket(url, say))) is not None]
        url = _url(address, tcp.getsockname()[1], options.token)
        say(f"serving {', '.join(runs)} at {url}")
        if options.token:
            say("whoever has this address with its token may see all images and tables of it")
        config = uvicorn.Config(
            application, log_config=None, access_log=False, server_header=False, lifespan="on",
            timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        server = uvicorn.Server(config)
        if open_browser:
            threading.Thread(target=_open_when_started, args=(server, url), daemon=True).start()
        server.run(sockets=[tcp, *local])


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:  # by which asyncio knows TCP
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise JobError(
                f"cannot listen on {address.host} port {address.port}: {why}; choose another --port or --host"
            ) from error
        listener.listen(BACKLOG)
        yield listener


def _url(address: Address, port: int, token: str) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    if host in ("0.0.0.0", "[::]"):
        host = socket.gethostname()
    return f"http://{host}:{port}/" + (f"?token={token}" if token else "")


def _open_when_started(server: uvicorn.Server, url: str) -> None:
    while not server.started:
        time.sleep(0.05)
    webbrowser.open(url)
