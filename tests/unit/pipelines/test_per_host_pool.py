"""Turns of hosts: never more calls than a host may have, and none that another host's calls keep waiting."""

from __future__ import annotations

import threading

import pytest

from clipray.pipelines.per_host_pool import PerHostPool


def test_a_host_has_its_turns_and_keeps_no_thread_from_others() -> None:
    pool, lock, may_end = PerHostPool(3, "fetch", 2), threading.Lock(), threading.Event()
    running, most, started = [0], [0], list[int]()

    def slow(number: int) -> int:
        with lock:
            started.append(number)
            running[0] += 1
            most[0] = max(most[0], running[0])
        assert may_end.wait(60)
        with lock:
            running[0] -= 1
        return number

    slows = [pool.submit("slow.example", slow, number) for number in range(20)]
    others = [pool.submit(host, str, host) for host in ("a.example", "b.example", None)]
    assert [future.result(60) for future in others] == ["a.example", "b.example", "None"]
    assert sorted(started) == [0, 1]
    may_end.set()
    assert [future.result(60) for future in slows] == list(range(20))
    assert (most[0], started[2:]) == (2, sorted(started[2:]))


def test_a_call_that_fails_gives_its_turn_to_the_next() -> None:
    pool = PerHostPool(4, "fetch", 1)
    futures = [pool.submit("a.example", int, text) for text in ("1", "x", "3")]
    assert futures[0].result(60) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        futures[1].result(60)
    assert futures[2].result(60) == 3
