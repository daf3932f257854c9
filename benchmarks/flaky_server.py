"""Rows that one plain run loses to a server that is flaky: over HTTP and over S3.

    python benchmarks/flaky_server.py [--rows 600] [--bad-s 30] [--over http s3]

For the first BAD_S seconds every third request is answered with 503; every tenth body is cut off, and every twentieth
drips, a byte a second. Needs the packages of `clipray[test]`.
"""

import argparse
import io
import itertools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from werkzeug.serving import WSGIRequestHandler, make_server

from clipray.storage.folder import Folder
from clipray.tables import read_record, read_table


class Flaky:
    """An application of WSGI that spoils what another one answers."""

    def __init__(self, inner: Any, bad_s: float) -> None:
        self.inner, self.bad_s, self.spoilt = inner, bad_s, dict.fromkeys(("503", "cut", "dripped"), 0)
        self.armed = False  # once the files are there
        self.began: float | None = None  # when the job asked first
        self._numbers = itertools.count(1)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not self.armed or environ["REQUEST_METHOD"] != "GET":
            return self.inner(environ, start_response)
        self.began = self.began or time.monotonic()
        number = next(self._numbers)
        if number % 3 == 0 and time.monotonic() - self.began < self.bad_s:
            self.spoilt["503"] += 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        body = b"".join(self.inner(environ, start_response))
        if number % 20 == 0:
            self.spoilt["dripped"] += 1
            return dripping(body)
        if number % 10 == 0:
            self.spoilt["cut"] += 1
            return [body[:-1]]
        return [body]


def dripping(body: bytes) -> Iterator[bytes]:
    for number in range(len(body)):
        yield body[number : number + 1]
        time.sleep(1)


class Quiet(WSGIRequestHandler):
    def log(self, *args: object) -> None:
        pass


def serve(app: Any, handler: type) -> int:
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def images(rows: int) -> list[bytes]:
    made = []
    for number in range(rows):
        sink = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG")
        made.append(sink.getvalue())
    return made


def over_http(bodies: list[bytes], bad_s: float) -> tuple[Flaky, list[str]]:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        body = bodies[int(environ["PATH_INFO"].strip("/"))]
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    flaky = Flaky(app, bad_s)
    port = serve(flaky, Quiet)
    return flaky, [f"http://127.0.0.1:{port}/{n}" for n in range(len(bodies))]


def over_s3(bodies: list[bytes], bad_s: float) -> tuple[Flaky, list[str]]:
    import os

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    flaky = Flaky(DomainDispatcherApplication(create_backend_app), bad_s)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{serve(flaky, Quiet)}", "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    fs = fsspec.filesystem("s3")
    fs.mkdir("bucket")
    for number, body in enumerate(bodies):
        fs.pipe_file(f"bucket/{number}.jpg", body)
    return flaky, [f"s3://bucket/{n}.jpg" for n in range(len(bodies))]


def measure(way: str, rows: int, bad_s: float, timeout_s: float) -> int:
    """Rows lost."""
    flaky, uris = (over_http if way == "http" else over_s3)(images(rows), bad_s)
    with tempfile.TemporaryDirectory() as home:
        pq.write_table(pa.table({"image_id": uris, "uri": uris}), f"{home}/m.parquet")
        step = {"manifest": f"{home}/m.parquet", "max_reject_rate": 1.0, "fetch_timeout_s": timeout_s}
        job = {"output": f"{home}/out", "model": {"name": "demo"}, "steps": [{"embed_images": step}]}
        Path(f"{home}/job.yaml").write_text(yaml.safe_dump(job))
        flaky.armed, began = True, time.monotonic()
        subprocess.run([sys.executable, "-m", "clipray", "run", f"{home}/job.yaml"], check=True)
        seconds = time.monotonic() - began
        record = read_record(Folder(f"{home}/out/images"))
        assert record is not None
        print(
            f"{way}: {rows} rows in {seconds:.0f} s, {record.rejects} lost {record.rejects_by_reason or ''}; {flaky.spoilt}"
        )
        if record.rejects:
            print(*read_table(f"{home}/out/rejects/images")["message"].to_pylist()[:5], sep="\n")
        return record.rejects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--bad-s", type=float, default=30)
    parser.add_argument("--timeout-s", type=float, default=30)
    parser.add_argument("--over", nargs="+", choices=["http", "s3"], default=["http", "s3"])
    args = parser.parse_args()
    sys.exit(1 if sum(measure(way, args.rows, args.bad_s, args.timeout_s) for way in args.over) else 0)


if __name__ == "__main__":
    main()
