"""Makes the screenshots of docs/serve.md from the demo's run.

    clipray demo runs/demo
    python tools/serve_screenshots.py runs/demo docs [--browser /usr/bin/chromium]

Needs `clipray[test]` and Chromium. Pages are taken in light colours, as JPEG of 1,280 px.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGES = {
    "serve-search": ("/search?text=a+red+circle&minus=a+word", 820),
    "serve-row": ("/rows/single-00002", 760),
    "serve-map": ("/map/map", 720),
}
FLAGS = [
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--use-gl=angle", "--use-angle=swiftshader"),
    "--enable-unsafe-swiftshader",
]
START_S = 60


@contextmanager
def served(run: str) -> Iterator[str]:
    """The address of a server of the run."""
    command = [str(Path(sys.executable).parent / "clipray"), "serve", run, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = re.search(r"http://\S+", server.stderr.readline())
        if address is None:
            raise SystemExit("the server did not start")
        yield address[0].rstrip("/")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    options = parser.parse_args()
    with served(options.run) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        until = time.monotonic() + START_S
        while '"state":"ready"' not in page.request.get(f"{address}/api/status").text() and time.monotonic() < until:
            time.sleep(0.2)
        for name, (path, height) in PAGES.items():
            page.set_viewport_size({"width": 1280, "height": height})
            page.goto(address + path, wait_until="networkidle")
            page.wait_for_timeout(1_000)  # thumbnails and the canvas are drawn
            page.screenshot(path=options.folder / f"{name}.jpg", type="jpeg", quality=80)
        browser.close()


if __name__ == "__main__":
    main()
