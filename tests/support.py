"""Helpers that tests import: where things are, pictures to draw, job files to write."""

from __future__ import annotations

import contextlib
import http.server
import io
import itertools
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipray.models.preprocess import Preprocess

AS_IT_IS = Preprocess(lambda image, _height, _width: np.asarray(image), lambda _height, _width: 0)
"""Pixels that no model scales."""
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT / "tests" / "lib"), os.environ.get("PYTHONPATH")]))
"""For processes that are to find the filesystems of `lib/testfs.py`."""
CLIPRAY = str(Path(sys.executable).parent / "clipray")

TINY_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def draw_pictures(folder: Path, count: int, *, start: int = 0) -> None:
    """Gradients with a coloured disc: cheap, different, and no two of the same file size by intent."""
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        height, width = (int(v) for v in rng.integers(48, 96, 2))
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        canvas = (np.stack([y, x, y * x], -1) * rng.integers(80, 255, 3)).astype(np.uint8)
        canvas[(y - rng.random()) ** 2 + (x - rng.random()) ** 2 < 0.05] = rng.integers(0, 255, 3)
        path = folder / f"class{number % 3}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas).save(path, quality=90)


def write_traps(folder: Path) -> Path:
    """Modules of the user's own in a working directory; what imports one adds its name to the file that is returned."""
    for module in ("random", "ray", "torch", "clipray", "sitecustomize"):
        (folder / f"{module}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write({module!r})\n")
    return folder / "imported"


def write_job(
    path: Path, manifest: Path | str, model: str, *, output: Path | str | None = None, **settings: object
) -> str:
    """A job file with one `embed_images` step; `model` is a local-dir name. Returns its path."""
    import yaml

    job = {
        "output": str(output or path.parent / "out"),
        "model": {"name": model, "precision": settings.pop("precision", "fp32")},
        "steps": [{"embed_images": {"manifest": str(manifest), **settings}}],
    }
    path.write_text(yaml.safe_dump(job))
    return str(path)


@dataclass(frozen=True)
class Answer:
    """What a `Website` sends.

    Attributes:
        cut: end the connection before the last byte. drip_s: seconds between the bytes, or before any where there are none.
        in_parts: send the part that is asked for.
    """

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    drip_s: float = 0.0
    length: bool = True
    in_parts: bool = False

    def part(self, asked: str | None) -> Answer:
        """asked: the header `Range`."""
        if not (self.in_parts and asked):
            return self
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        status = 206 if first < len(self.body) else 416
        return replace(self, body=self.body[first : last + 1], status=status)


class Website:
    """An HTTP server on loopback.

    Attributes:
        answers: by path, what comes first, second, … and from then on. requests: what was asked for, in order.
        user_agents: of those who asked.
        bad: what a request gets instead, by its number, counted from 1.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[str] = []
        self.user_agents = set[str | None]()
        self.bad: Callable[[int], dict[str, Any]] = lambda _: {}
        self.ended = threading.Event()
        self._lock = threading.Lock()
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection |= site.send(self.path, self)

            def do_HEAD(self) -> None:
                raise AssertionError("nobody needs a HEAD before a GET")

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a reader that stops at its limit closes the connection

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def send(self, path: str, to: http.server.BaseHTTPRequestHandler) -> bool:
        """Answer a request; returns whether the connection is to be closed."""
        with self._lock:
            self.requests.append(path)
            self.user_agents.add(to.headers["User-Agent"])
            number, planned = len(self.requests), self.answers.get(path, [Answer(b"no such page", 404)])
            answer = planned.pop(0) if len(planned) > 1 else planned[0]
        answer = replace(answer, **self.bad(number)).part(to.headers.get("Range"))
        if answer.drip_s and not answer.body and self.ended.wait(answer.drip_s):
            return True
        to.send_response(answer.status)
        for name, value in answer.headers:
            to.send_header(name, value)
        if answer.length:
            to.send_header("Content-Length", str(len(answer.body)))
        to.end_headers()
        body = answer.body[:-1] if answer.cut else answer.body
        for start in range(0, max(1, len(body)), 1 if answer.drip_s else max(1, len(body))):
            if answer.drip_s and self.ended.wait(answer.drip_s):
                return True
            to.wfile.write(body[start:] if not answer.drip_s else body[start : start + 1])
            to.wfile.flush()
        return answer.cut or not answer.length

    def stop(self) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()


ForkedWorkers = Callable[[], contextlib.AbstractContextManager[None]]
"""Within it, a Ray that starts has workers that are forked."""


class ObjectStore:
    """An S3 server on loopback.

    Attributes:
        environment: by which every process finds it. SECRET: of these, what must be seen nowhere else.
        throttled, cut, dripped: every so many requests are answered with 503, or broken off, or byte by byte; 0: none.
        denied: answer everything with 403.
        requests: what was asked for, in order: `GET /bucket/key`.
    """

    SECRET = "hush-4711-never-write-this-down"

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self._moto = DomainDispatcherApplication(create_backend_app)
        self.requests: list[str] = []
        self._requests = itertools.count(1)
        self.throttled = self.cut = self.dripped = self.failures = 0
        self._ended = threading.Event()
        self.denied = False
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": self.SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        number = next(self._requests)
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if self.denied:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if self.throttled and number % self.throttled == 0:
            self.failures += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        answer = self._moto(environ, start_response)
        if self.cut and number % self.cut == 0 and environ["REQUEST_METHOD"] == "GET":
            self.failures += 1
            return [b"".join(answer)[:-1]]  # the connection ends before what was announced is there
        if self.dripped and number % self.dripped == 0 and environ["REQUEST_METHOD"] == "GET":
            self.failures += 1
            return self._dripping(b"".join(answer))
        return answer

    def _dripping(self, data: bytes) -> Iterable[bytes]:
        """A byte a second."""
        for number in range(len(data)):
            yield data[number : number + 1]
            if self._ended.wait(1):
                return

    def stop(self) -> None:
        self._ended.set()
        self._server.shutdown()


BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
"""A block of a page: its language and its text."""


def follow(text: str, home: Path) -> str:
    """Do what a page says, block after block, in the folder `home` and in this process; returns what was printed.

    Blocks of yaml whose first line is `# NAME.yaml` are written to that file, lines of bash that call clipray or `python -c`
    are run, but for those of blocks that need the network, and so are blocks of python. A session's Ray (`ray_here`) serves all of them.
    """
    printed = ""
    for kind, block in BLOCK.findall(text):
        if kind == "yaml" and (name := re.match(r"# (\w+\.yaml)\n", block)):
            (home / name[1]).write_text(block, encoding="utf-8")
        elif kind == "bash" and "needs the network" not in block:
            for words in (shlex.split(line, comments=True) for line in block.splitlines()):
                if words[:1] == ["clipray"]:
                    printed += clipray_here(words[1:], home)
                elif words[:2] == ["python", "-c"]:
                    printed += python_here(words[2], home)
        elif kind == "python":
            printed += python_here(block, home)
    return printed


def python_here(code: str, home: Path) -> str:
    """Run code in this process, in the folder `home`; returns what it printed."""
    with contextlib.chdir(home), contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "page", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def clipray_here(words: list[str], home: Path) -> str:
    """Run the command in this process, in the folder `home`; returns what it printed."""
    from typer.testing import CliRunner

    from clipray.cli import app

    with contextlib.chdir(home):
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"clipray {shlex.join(words)}: {done.exception!r}\n{done.output}"
    return done.stdout
