"""Bytes from servers, good and bad: each failure has its reason, a passing one is tried again, all is bounded."""

from __future__ import annotations

import email.utils
import itertools
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from support import Answer, Website

import clipray
from clipray.pipelines.image_fetch import Fetcher, NoRoom, fetch
from clipray.pipelines.retries import ATTEMPTS, LONGEST_WAIT_S, SILENT_S, Failure, Retries, Servers
from clipray.pipelines.spec import Limits
from clipray.storage.uris import with_byte_range
from clipray.tables.reasons import Rejected, http_reason, is_passing

LIMITS = Limits(schemes=("http", "https", "memory", "s3"), fetch_timeout_s=5.0, max_bytes=100_000)
BODY = bytes(range(256)) * 100


@pytest.fixture(scope="module")
def site() -> Iterator[Website]:
    site = Website()
    yield site
    site.stop()


class Clock:
    """A time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.waits = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def retries(clock: Clock) -> Retries:
    return Retries(Servers(clock), clock, clock.sleep, lambda: 1.0)


def patient(limits: Limits = LIMITS) -> tuple[Fetcher, Clock]:
    """A fetcher whose waits take no time."""
    clock = Clock()
    return Fetcher(limits, retries(clock)), clock


def refused(uri: str, fetcher: Fetcher) -> Rejected:
    with pytest.raises(Rejected) as raised:
        fetcher.fetch(uri)
    assert raised.value.stage == "fetch"
    return raised.value


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# --- over HTTP


def test_a_file_arrives_with_one_request(site: Website) -> None:
    site.answers["/good"] = [Answer(BODY)]
    site.answers["/unsized"] = [Answer(BODY, length=False)]
    site.answers["/q%20?a=b"] = [Answer(b"x")]
    before = len(site.requests)
    assert fetch(f"{site.url}/good", LIMITS) == BODY
    assert fetch(f"{site.url}/unsized".replace("http", "HTTP"), LIMITS) == BODY
    assert fetch(f"{site.url}/q%20?a=b", LIMITS) == b"x"
    assert site.requests[before:] == ["/good", "/unsized", "/q%20?a=b"]


@pytest.mark.parametrize(("status", "phrase"), [(403, "Forbidden"), (404, "Not Found"), (410, "Gone"), (418, "")])
def test_a_lasting_status_is_the_reason_at_once(site: Website, status: int, phrase: str) -> None:
    site.answers["/no"] = [Answer(b"page", status)]
    fetcher, clock = patient()
    refusal = refused(f"{site.url}/no", fetcher)
    assert (refusal.reason, clock.waits) == (f"http_{status}", [])
    assert refusal.message.startswith(f"{site.url}/no: {status} {phrase}")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_status_is_asked_again(site: Website, status: int) -> None:
    site.answers["/busy"] = [Answer(b"", status)] * 2 + [Answer(BODY)]
    fetcher, clock = patient(replace(LIMITS, fetch_timeout_s=30))
    assert fetcher.fetch(f"{site.url}/busy") == BODY
    assert clock.waits == [0.5, 1.0]
    site.answers["/busy"] = [Answer(b"", status)]
    assert refused(f"{site.url}/busy", fetcher).reason == f"http_{status}"
    assert clock.waits[2:] == [0.5, 1.0]


def test_the_server_says_how_long_to_wait(site: Website) -> None:
    in_four = email.utils.formatdate(time.time() + 4, usegmt=True)
    for value, expected in (("3", 3.0), (in_four, 4.0), ("soon", 0.5), ("-1", 0.5), ("99999999", None)):
        site.answers["/wait"] = [Answer(b"", 429, (("Retry-After", value),)), Answer(BODY)]
        fetcher, clock = patient(replace(LIMITS, fetch_timeout_s=30))
        if expected is None:  # longer than a row may take: a later pass asks again
            assert refused(f"{site.url}/wait", fetcher).reason == "http_429"
            assert clock.waits == []
        else:
            assert fetcher.fetch(f"{site.url}/wait") == BODY
            assert clock.waits == [pytest.approx(expected, abs=1.5 if value == in_four else 0)]


def test_a_body_that_is_cut_off_is_asked_for_again(site: Website) -> None:
    site.answers["/cut"] = [Answer(BODY, cut=True), Answer(BODY)]
    fetcher, clock = patient()
    assert fetcher.fetch(f"{site.url}/cut") == BODY
    assert clock.waits == [0.5]
    site.answers["/cut"] = [Answer(BODY, cut=True)]
    refusal = refused(f"{site.url}/cut", fetcher)
    assert (refusal.reason, "broke off" in refusal.message) == ("unreachable", True)


@pytest.mark.parametrize("answer", [Answer(b"", drip_s=60), Answer(BODY, drip_s=0.05), Answer(BODY, drip_s=60)])
def test_no_answer_takes_longer_than_the_time_that_is_given(site: Website, answer: Answer) -> None:
    """The server would take at least twenty minutes, or never end a single wait: only a bound on the whole ends this."""
    site.answers["/slow"] = [answer]
    assert refused(f"{site.url}/slow", Fetcher(replace(LIMITS, fetch_timeout_s=0.5))).reason == "timed_out"


def test_a_body_that_only_drips_is_asked_for_again_while_there_is_time(site: Website) -> None:
    """Forty bytes a second would take ten minutes: given up after a sixth of the time, and asked for again in the rest."""
    for drip_s in (0.025, 60):
        site.answers["/drips"] = [Answer(BODY, drip_s=drip_s), Answer(BODY)]
        before = len(site.requests)
        assert Fetcher(replace(LIMITS, fetch_timeout_s=6.0)).fetch(f"{site.url}/drips") == BODY
        assert len(site.requests) - before >= 2


def test_a_patient_fetcher_asks_again_after_a_time_out(site: Website) -> None:
    limits = replace(LIMITS, fetch_timeout_s=0.6)  # no wait fits into it, twice
    site.answers["/slow"] = [Answer(BODY, drip_s=1)] * 3 + [Answer(BODY)]
    assert refused(f"{site.url}/slow", Fetcher(limits)).reason == "timed_out"
    site.answers["/slow"] = [Answer(BODY, drip_s=1)] * 2 + [Answer(BODY)]
    assert Fetcher(replace(limits, patience=3)).fetch(f"{site.url}/slow") == BODY


def test_no_more_is_read_than_may_be(site: Website) -> None:
    site.answers["/large"] = [Answer(bytes(100_001))]
    site.answers["/endless"] = [Answer(bytes(5_000_000), length=False)]
    site.answers["/empty"] = [Answer(b"")]
    fetcher, _ = patient()
    assert "100001 bytes, more than max_bytes=100000" in refused(f"{site.url}/large", fetcher).message
    assert refused(f"{site.url}/endless", fetcher).reason == "too_many_bytes"
    assert refused(f"{site.url}/empty", fetcher).reason == "empty"


def test_redirects_are_followed_a_bounded_number_of_times_and_nowhere_else(site: Website) -> None:
    def to(place: str) -> list[Answer]:
        return [Answer(b"", 302, (("Location", place),))]

    site.answers |= {"/a": to("b"), "/b": to(f"{site.url}/c"), "/c": [Answer(BODY)], "/loop": to("/loop")}
    site.answers |= {"/file": to("file:///etc/passwd"), "/s3": to("s3://b/c"), "/secure": to("https://127.0.0.1/x")}
    site.answers["/nowhere"] = [Answer(b"", 302)]
    fetcher, _ = patient(replace(LIMITS, schemes=("http", "s3", "file")))
    assert fetcher.fetch(f"{site.url}/a") == BODY
    assert refused(f"{site.url}/loop", fetcher).reason == "http_302"
    assert "more than 10 redirects" in refused(f"{site.url}/loop", fetcher).message
    assert refused(f"{site.url}/nowhere", fetcher).reason == "http_302"
    for name in ("file", "s3", "secure"):
        assert refused(f"{site.url}/{name}", fetcher).reason == "scheme_not_allowed"


def test_a_server_is_told_who_asks_also_where_it_redirects_to(site: Website) -> None:
    site.answers |= {"/moved": [Answer(b"", 301, (("Location", "/good"),))], "/good": [Answer(BODY)]}
    site.user_agents.clear()
    fetch(f"{site.url}/moved", LIMITS)
    fetch(f"{site.url}/moved", replace(LIMITS, user_agent="mybot/1.0"))
    assert site.user_agents == {f"clipray/{clipray.__version__}", "mybot/1.0"}


def test_a_file_that_its_server_keeps_from_such_uses_is_rejected_at_once(site: Website) -> None:
    site.answers["/kept"] = [Answer(BODY, headers=(("X-Robots-Tag", "nosnippet"), ("X-Robots-Tag", "NoAI")))]
    fetcher, clock = patient(replace(LIMITS, disallowed_header_directives=("noai",)))
    refusal = refused(f"{site.url}/kept", fetcher)
    assert (refusal.reason, clock.waits) == ("robots_disallowed", [])
    assert refusal.message == f"{site.url}/kept: X-Robots-Tag: noai"
    assert fetch(f"{site.url}/kept", replace(LIMITS, disallowed_header_directives=("noindex",))) == BODY


def test_a_dead_server_is_let_alone_for_a_while_and_others_are_not(site: Website) -> None:
    site.answers["/good"] = [Answer(BODY)]
    dead = f"http://127.0.0.1:{closed_port()}"
    fetcher, clock = patient(replace(LIMITS, fetch_timeout_s=30))
    first = refused(f"{dead}/a.jpg", fetcher)
    assert (first.reason, len(clock.waits)) == ("unreachable", ATTEMPTS - 1)
    later = [refused(f"{dead}/{n}.jpg", fetcher) for n in range(100)]
    assert {refusal.reason for refusal in later} == {"unreachable"}
    assert "did not answer a moment ago" in later[0].message
    assert len(clock.waits) == ATTEMPTS - 1
    assert fetcher.fetch(f"{site.url}/good") == BODY
    clock.now += SILENT_S
    refused(f"{dead}/a.jpg", fetcher)
    assert len(clock.waits) == 2 * (ATTEMPTS - 1)


def test_what_is_no_url_lasts() -> None:
    fetcher, clock = patient()
    for uri in ("http://", "http:///x", "https://[::1/a"):
        assert refused(uri, fetcher).reason == "invalid_uri"
    assert clock.waits == []


def test_many_threads_share_a_fetcher(site: Website) -> None:
    numbers = itertools.count()
    site.bad = lambda number: {"status": 503} if number % 3 == 0 else {"cut": True} if number % 10 == 0 else {}
    site.answers |= {f"/{n}": [Answer(BODY + bytes([n]))] for n in range(200)}
    before = len(site.requests)
    fetcher = Fetcher(LIMITS, Retries(sleep=lambda _: next(numbers), jitter=lambda: 0.0))
    with ThreadPoolExecutor(32) as pool:
        bodies = list(pool.map(lambda n: _or_refused(fetcher, f"{site.url}/{n}"), range(200)))
    site.bad = lambda _: {}
    lost = [body for body in bodies if isinstance(body, Rejected)]
    assert all(body == BODY + bytes([n]) for n, body in enumerate(bodies) if not isinstance(body, Rejected))
    assert all(is_passing(refusal.reason) for refusal in lost)
    assert len(lost) < 40  # each has three attempts, of which two in five fail
    assert len(site.requests) - before > 250


def _or_refused(fetcher: Fetcher, uri: str) -> bytes | Rejected:
    try:
        return fetcher.fetch(uri)
    except Rejected as refusal:
        return refusal


# --- parts of files


@pytest.fixture
def packs(site: Website, s3: str, tmp_path: Path) -> dict[str, str]:
    """The same file wherever files lie, and on a server that sends no parts."""
    site.answers["/pack"] = [Answer(BODY, in_parts=True)]
    site.answers["/moved"] = [Answer(b"", 302, (("Location", "/pack"),))]
    site.answers["/whole"] = [Answer(BODY)]
    local = tmp_path / "a b.tar"
    local.write_bytes(BODY)
    fsspec.filesystem("memory").pipe_file("/pack", BODY)
    fsspec.filesystem("s3").pipe_file(f"{s3}/pack", BODY)
    urls = {name: f"{site.url}/{name}" for name in ("pack", "moved", "whole")}
    return {**urls, "s3": f"{s3}/pack", "memory": "memory://pack", "local": str(local), "file": local.as_uri()}


def test_a_part_of_a_file_is_all_that_is_read(packs: dict[str, str]) -> None:
    fetcher, clock = patient(replace(LIMITS, schemes=("http", "memory", "s3", "file"), max_bytes=1_000))
    for pack in packs.values():
        for offset, size in ((0, 1), (300, 1_000), (len(BODY) - 5, 5)):
            assert fetcher.fetch(with_byte_range(pack, offset, size)) == BODY[offset : offset + size]
        reasons = {(len(BODY) - 5, 6): "truncated", (len(BODY), 1): "truncated", (0, 0): "empty"}
        reasons |= {(0, 1_001): "too_many_bytes", (len(BODY) + 1, 2_000): "too_many_bytes"}
        for (offset, size), reason in reasons.items():
            assert refused(with_byte_range(pack, offset, size), fetcher).reason == reason, pack
        assert refused(f"{pack}#bytes=9-7", fetcher).reason == "invalid_uri"
    assert clock.waits == []
    for pack in ("pack", "s3"):
        with pytest.raises(NoRoom) as raised:
            fetcher.fetch(with_byte_range(packs[pack], 0, 900), 899)
        assert raised.value.size == 900


def test_of_a_file_that_comes_whole_nothing_is_read_behind_the_part(site: Website) -> None:
    site.answers["/large"] = [Answer(BODY + bytes(50_000_000))]
    fetcher, _ = patient()
    assert fetcher.fetch(f"{site.url}/large#bytes=100-199") == BODY[100:200]


# --- what decides


def failing(reason: str, **facts: object) -> Callable[[float], bytes]:
    def request(_: float) -> bytes:
        raise Failure(Rejected("fetch", reason, "said"), **{"answered": True, **facts})

    return request


def test_waits_grow_to_a_bound_and_end_with_the_time() -> None:
    clock = Clock()
    with pytest.raises(Rejected, match="said"):
        retries(clock).run(failing("http_503"), "s", "s/a", 1_000, 3)
    assert clock.waits == [0.5, 1.0, 2.0, 4.0] + [LONGEST_WAIT_S] * (3 * ATTEMPTS - 5)
    clock = Clock()
    with pytest.raises(Rejected, match="said"):
        retries(clock).run(failing("http_503"), "s", "s/a", 1.0, 1)
    assert clock.waits == [0.5]


def test_waits_differ_by_the_jitter() -> None:
    clock = Clock()
    with pytest.raises(Rejected):
        Retries(Servers(clock), clock, clock.sleep, lambda: 0.0).run(failing("http_503"), "s", "s/a", 30, 1)
    assert clock.waits == [0.25, 0.5]


def test_each_request_may_take_no_more_than_is_left() -> None:
    clock, given = Clock(), list[float]()

    def request(seconds: float) -> bytes:
        given.append(seconds)
        clock.now += 4
        raise Failure(Rejected("fetch", "timed_out", "said"), answered=True)

    with pytest.raises(Rejected):
        retries(clock).run(request, "s", "s/a", 10, 1)
    assert given == [10, 5.5, 0.5]


def test_a_server_that_answers_others_meanwhile_is_not_silent() -> None:
    clock = Clock()
    servers = Servers(clock)

    def request(_: float) -> bytes:
        clock.now += 5
        servers.answered("s")
        clock.now += 5
        raise Failure(Rejected("fetch", "timed_out", "said"), answered=False)

    with pytest.raises(Rejected):
        Retries(servers, clock, clock.sleep).run(request, "s", "s/a", 10, 1)
    assert not servers.is_silent("s")
    servers.did_not_answer("s")
    assert servers.is_silent("s")
    servers.answered("s")
    assert not servers.is_silent("s")


def test_patience_is_for_servers_that_answer() -> None:
    clock = Clock()
    with pytest.raises(Rejected):
        retries(clock).run(failing("unreachable"), "s", "s/a", 3, 3)
    assert clock.waits == [0.5, 1.0, 2.0, 4.0]
    clock = Clock()
    with pytest.raises(Rejected):
        retries(clock).run(failing("unreachable", answered=False), "s", "s/a", 3, 3)
    assert clock.waits == [0.5, 1.0]


def test_a_failure_that_another_request_does_not_mend_is_not_repeated() -> None:
    for request in (failing("http_404"), failing("unreachable", again=False), failing("empty")):
        clock = Clock()
        with pytest.raises(Rejected):
            retries(clock).run(request, "s", "s/a", 30, 3)
        assert clock.waits == []


def test_which_reasons_pass() -> None:
    assert all(is_passing(r) for r in ("unreachable", "timed_out", *map(http_reason, (408, 429, 500, 503, 599))))
    lasting = ("not_found", "forbidden", "empty", "http_", "http_x", *map(http_reason, (301, 400, 401, 403, 404, 410)))
    assert not any(is_passing(reason) for reason in lasting)
