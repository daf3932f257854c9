"""Which files `X-Robots-Tag` keeps from whom."""

from __future__ import annotations

import pytest

from clipray.pipelines.robots_tag import disallowing_directive


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], None),
        (["all", "nosnippet, nofollow"], None),
        (["noai"], "noai"),
        (["nosnippet", "nofollow,  NoIndex "], "noindex"),
        (["mybot: noai"], "noai"),
        (["MyBot : nosnippet, noai"], "noai"),
        (["otherbot: noai, noindex"], None),
        (["otherbot: noai, mybot: noindex"], "noindex"),
        (["otherbot: noai", "noindex"], "noindex"),
        (["max-snippet: 20, noai"], "noai"),
        (["unavailable_after: Wed, 25 Jun 2031 15:00:00 GMT, noai"], "noai"),
        (["otherbot: max-snippet: 20, noai"], None),
        (["", ":", "mybot:", ",,"], None),
    ],
)
def test_directives_hold_for_everyone_or_for_whom_they_name(values: list[str], expected: str | None) -> None:
    agent = "Mozilla/5.0 (compatible; MyBot/1.0; +https://example.org/bot)"
    assert disallowing_directive(values, agent, ("noai", "noindex")) == expected


def test_only_chosen_directives_count() -> None:
    assert disallowing_directive(["noai, noindex"], "mybot", ("noindex",)) == "noindex"
    assert disallowing_directive(["noai, noindex"], "mybot", ()) is None
