"""What is changed in Ray while it starts here is as before when it has."""

from __future__ import annotations

import contextlib

from ray._private.node import Node

from clipray.engine.connect import without_helpers

HELPERS = ("start_monitor", "start_log_monitor", "start_api_server")


def test_ray_has_its_helpers_again_afterwards() -> None:
    before = [getattr(Node, name) for name in HELPERS]
    with contextlib.suppress(KeyError), without_helpers():
        assert not {getattr(Node, name) for name in HELPERS} & set(before)
        raise KeyError
    assert [getattr(Node, name) for name in HELPERS] == before
