"""The header `X-Robots-Tag`, by which a server says what a file must not be used for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

PRODUCT = re.compile(r"[\w.-]+")
VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")  # with a colon of their own


def disallowing_directive(values: Iterable[str], user_agent: str, disallowed: Collection[str]) -> str | None:
    """The first of the `disallowed` directives that holds for `user_agent`; None where none does.

    Args:
        values: of the headers: `noai, noindex` for everyone, `mybot: noai, otherbot: noindex` for agents by name.
    """
    products = PRODUCT.findall(user_agent.lower())
    for value in values:
        addressed = True
        for part in value.lower().split(","):
            name, colon, value_of_name = (text.strip() for text in part.partition(":"))
            if colon and name not in VALUED and PRODUCT.fullmatch(name):
                addressed = name in products
            directive = value_of_name if colon else name
            if addressed and directive in disallowed:
                return directive
    return None
