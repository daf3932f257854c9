"""Why rows are rejected: the closed set of reasons, and which of them may pass by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal, NewType

Reason = Literal[
    "null_id", "duplicate_id", "not_utf8", "not_downloaded", "no_source", "scheme_not_allowed", "invalid_uri", "not_found", "not_a_file",
    "forbidden", "robots_disallowed",
    "unreachable", "timed_out", "too_many_bytes", "empty",
    "not_an_image", "truncated", "undecodable", "too_many_pixels", "encode_failed", "worker_died", "empty_box", "outside_crop",
    "no_such_image", "no_label", "no_boxes", "too_many_boxes", "unequal_lists",
    "not_a_point_cloud", "not_finite", "too_few_points",
]  # fmt: skip
HttpReason = NewType("HttpReason", str)
"""A status that a server answered with, such as `http_404`."""
Stage = Literal["manifest", "fetch", "decode", "encode", "pool"]

PASSING = ("unreachable", "timed_out")
PASSING_STATUSES = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
PREFIX = "http_"


def http_reason(status: int) -> HttpReason:
    return HttpReason(f"{PREFIX}{status}")


def is_passing(reason: str) -> bool:
    """Whether the same row may well be had a while later: its server was not there, too busy, or broken."""
    status = reason.removeprefix(PREFIX)
    if status == reason or not status.isdigit():
        return reason in PASSING
    return int(status) in PASSING_STATUSES or int(status) >= HTTPStatus.INTERNAL_SERVER_ERROR


def passing(counts: Mapping[str, int]) -> int:
    """Of rejects counted by reason, how many may pass."""
    return sum(count for reason, count in counts.items() if is_passing(reason))


class Rejected(Exception):
    """This row cannot become a row of the table."""

    def __init__(self, stage: Stage, reason: Reason | HttpReason, message: str) -> None:
        super().__init__(message)
        self.stage, self.reason, self.message = stage, reason, message[:500]
