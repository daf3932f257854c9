"""The served page of the demo in a real browser: what people do with mouse, keyboard and phone; and what axe-core says of it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from clipray.serve import app

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")

FLAGS = (
    "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--enable-unsafe-swiftshader",
)  # fmt: skip
PAGES = (
    "/", "/search?text=a+red+circle&unlike=single-00007", "/search/filters", "/rows/single-00000", "/clusters/clusters",
    "/clusters/clusters/0", "/labels/labels", "/labels/labels/rows?predicted=red+circle", "/duplicates/duplicates",
    "/duplicates/duplicates/0", "/rejects", "/tables", "/tables/labels", "/map/map", "/api", "/nowhere",
)  # fmt: skip
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
ADD_FILE = """([how, name, type, base64]) => {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const options = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(how === "drop" ? new DragEvent("drop", { ...options, dataTransfer: data })
    : new ClipboardEvent("paste", { ...options, clipboardData: data }));
}"""

Open = Callable[..., "playwright.Page"]


@pytest.fixture(scope="module")
def url(demo_run: tuple[Path, str]) -> Iterator[str]:
    """The address of a server of the demo, whose model is loaded."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app(str(demo_run[0] / "runs" / "demo")), log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        while answer_of(f"{address}/api/status")["runs"][0]["state"] == "loading":
            time.sleep(0.1)
        yield address
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: playwright.Browser, url: str) -> Iterator[Open]:
    """Opens a page. In the end, no page has said that something is wrong, but for answers that are errors on purpose."""
    complaints: list[str] = []
    contexts = []

    def opened(address: str, size: dict[str, int] = DESK, scheme: str = "light") -> playwright.Page:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url + address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [
        text for text in complaints if not text.startswith("Failed to load resource: the server responded with")
    ]


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core."""
    npm, home = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if npm is None:
        pytest.skip("npm is not installed, which gets axe-core")
    words = [npm, "install", "--no-save", "--no-audit", "--no-fund", "--prefix", str(home), "axe-core@4"]
    if subprocess.run(words, check=False, capture_output=True, timeout=180).returncode:
        pytest.skip("npm cannot get axe-core here")
    return (home / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


def answer_of(address: str) -> dict:
    with urllib.request.urlopen(address) as answer:
        return json.load(answer)


def ids_of(page: playwright.Page) -> list[str]:
    page.wait_for_selector(".tile .name")
    return page.locator(".tile .name").all_inner_texts()


def query_of(page: playwright.Page) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def test_words_find_what_the_api_finds_and_the_grid_goes_on(open_page: Open, url: str) -> None:
    page = open_page("/")
    page.keyboard.type("a red circle")  # the search box has the focus
    page.keyboard.press("Enter")
    page.wait_for_url("**/search?text=a+red+circle*")
    hits = answer_of(f"{url}/api/search?text=a+red+circle&top=24")["hits"]
    assert ids_of(page)[:24] == [hit["image_id"] for hit in hits]
    assert page.locator(".chip").inner_text().split("\n")[:2] == ["+", "a red circle"]
    page.locator(".tile").last.scroll_into_view_if_needed()
    page.locator(".tile").nth(47).wait_for()
    ids = ids_of(page)
    assert len(set(ids)) == len(ids)


def test_an_image_that_is_dropped_and_one_that_is_pasted(open_page: Open, demo_run: tuple[Path, str]) -> None:
    page = open_page("/search")
    image = next((demo_run[0] / "runs" / "demo" / "world").rglob("single-00005.*")).read_bytes()
    page.evaluate(ADD_FILE, ["drop", "mine.jpg", "image/jpeg", base64.b64encode(image).decode()])
    page.wait_for_url("**image=*")
    assert ids_of(page)[0] == "single-00005"
    assert page.locator(".chip img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0
    page.get_by_label("Remove").click()
    page.wait_for_url(lambda address: "image=" not in address)
    page.evaluate(ADD_FILE, ["paste", "mine.jpg", "image/jpeg", base64.b64encode(bytes(range(250)) * 2).decode()])
    assert "mine.jpg: not_an_image" in page.locator("#results .error").inner_text()


def test_filters(open_page: Open) -> None:
    page = open_page("/search?text=a+red+circle")
    page.locator(".facet", has_text="kind").get_by_text("word", exact=True).click()
    page.wait_for_url("**where=*")
    assert query_of(page)["where"] == ["kind = 'word'"]
    assert all(name.startswith("word-") for name in ids_of(page))
    assert page.locator("#results .count").inner_text().startswith("32 of 464 rows match")
    page.locator("#filters a[aria-current]").click()  # a second click takes it away
    page.wait_for_url(lambda address: "where=" not in address)
    page.fill("#where", "nothing = 1")
    page.keyboard.press("Enter")
    page.wait_for_url("**where=nothing*")
    assert "nothing" in page.locator("#results .error").inner_text()


def test_the_keyboard_alone(open_page: Open) -> None:
    page = open_page("/search?like=single-00000")
    ids = ids_of(page)
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown"):
        page.keyboard.press(key)
    columns = page.evaluate("getComputedStyle(document.querySelector('.tiles')).gridTemplateColumns.split(' ').length")
    focused = "document.activeElement.closest('.tile').querySelector('.name').textContent"
    assert page.evaluate(focused) == ids[columns]
    page.keyboard.press("m")
    page.wait_for_url(f"**like={ids[columns]}*")
    page.keyboard.press("ArrowRight")
    first = page.evaluate(focused)
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/rows/{first}")
    page.keyboard.press("Escape")
    page.wait_for_url("**/search?like=*")
    page.keyboard.press("/")
    page.keyboard.type("green star")
    page.keyboard.press("Enter")
    page.wait_for_url("**text=green+star*")
    assert query_of(page)["like"] == [ids[columns]]  # words and the row together


def test_the_map(open_page: Open) -> None:
    page = open_page("/map/map")
    page.wait_for_selector("#map[data-ready]")
    assert page.locator("#legend button").count() == 16  # clusters
    box = page.locator("#points").bounding_box()
    page.click("#lasso")
    corners = [(0.02, 0.02), (0.5, 0.02), (0.5, 0.98), (0.02, 0.98)]
    page.mouse.move(box["x"] + 0.02 * box["width"], box["y"] + 0.02 * box["height"])
    page.mouse.down()
    for x, y in corners:
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.up()
    page.wait_for_selector("#picked .tile")
    rows = int(page.inner_text("#picked-title").split()[0])
    assert 100 < rows < 364
    page.locator("#more-rows").scroll_into_view_if_needed()
    page.locator("#picked .tile").nth(48).wait_for()
    page.evaluate("scrollTo(0, 0)")
    for step in range(400):
        page.mouse.move(box["x"] + box["width"] * (0.3 + 0.001 * step), box["y"] + box["height"] * 0.5)
        if page.wait_for_timeout(15) or page.locator("#hover img").is_visible():
            break
    assert page.locator("#hover img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 0
    page.focus("#points")
    for key in ("+", "ArrowLeft", "0", "Escape", "v"):
        page.keyboard.press(key)
    page.locator("#picked-title", has_text="464 rows").wait_for()
    page.select_option("#colour", "distance")
    page.wait_for_selector(".ramp")


def test_a_group_of_duplicates(open_page: Open) -> None:
    page = open_page("/duplicates/duplicates")
    group = page.locator(".group").first
    assert group.locator(".tile.kept").count() == 1
    page.click(".group h2 a")
    page.wait_for_url("**/duplicates/duplicates/*")
    assert page.locator(".tile").count() > 1


def test_an_image_that_cannot_be_shown_says_why(open_page: Open) -> None:
    page = open_page("/tables")
    page.evaluate("document.querySelector('main').append(Object.assign(new Image(), { src: '/thumbnail/nobody' }))")
    page.locator("main .none", has_text="no image 'nobody'").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_pages_fit_a_phone_and_axe_finds_no_serious_fault(open_page: Open, url: str, axe: str, scheme: str) -> None:
    """In the dark only colours can be at fault that are not in the light."""
    rules = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
    page = open_page("/", PHONE, scheme)
    faults = []
    for address in PAGES:
        page.goto(url + address)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], address
        page.evaluate(axe)
        violations = page.evaluate("(rules) => axe.run(document, { resultTypes: ['violations'], ...rules })", rules)[
            "violations"
        ]
        faults += [
            (address, f["id"], f["nodes"][0]["html"]) for f in violations if f["impact"] in ("serious", "critical")
        ]
    assert not faults
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(ground) > 600) == (scheme == "light")
