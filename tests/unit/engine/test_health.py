"""What a run says when Ray or its machine fails it: one line, and never an endless wait."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.data.exceptions import ExecutionTimeoutError

from clipray.engine import connect, health
from clipray.engine.connect import ROOM_BYTES, ready_for_ray
from clipray.engine.health import Health, answers_of, refuse_dying, unwrapped
from clipray.engine.progress import _Sums
from clipray.engine.tasks import map_tasks
from clipray.errors import ClipRayError, PlanError, RunError, SchemaError
from clipray.storage.environment import need_room


def of_a_task(cause: Exception) -> ray.exceptions.RayTaskError:
    return ray.exceptions.RayTaskError("f", "Traceback (most recent call last):\n  File x\nValueError: v", cause)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (of_a_task(SchemaError("row r7")), SchemaError, "row r7"),
        (of_a_task(of_a_task(SchemaError("row r7"))), SchemaError, "row r7"),
        (of_a_task(OSError(errno.ENOSPC, "No space left on device", "/x")), RunError, "/x: No space left"),
        (of_a_task(RuntimeError("cuda\nfell")), RunError, "a worker failed: RuntimeError: cuda fell; everything"),
        (of_a_task(KeyError("x")), KeyError, "x"),
        (ray.exceptions.OutOfMemoryError("a long report"), RunError, "a machine ran out of memory"),
        (ray.exceptions.ActorDiedError(of_a_task(ValueError("v"))), RunError, "workers failed"),
        (ExecutionTimeoutError("lines\nof\nadvice"), RunError, "no row came through"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_that_came_through_ray_is_one_line(error: Exception, kind: type[Exception], words: str) -> None:
    raised = unwrapped(error)
    assert type(raised) is kind
    assert words in str(raised)
    assert "\n" not in str(raised)
    assert "File x" not in str(raised)


def test_errors_of_actors_and_tasks_arrive(ray_here: Any, capfd: pytest.CaptureFixture[str]) -> None:
    class Fails:
        def answer(self) -> None:
            raise SchemaError("row r7")

    def fails(_: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/x")

    actor = ray_here.remote(num_cpus=0)(Fails).remote()
    with pytest.raises(SchemaError, match="row r7"):
        answers_of([actor.answer.remote()])
    ray_here.kill(actor)
    with pytest.raises(ClipRayError, match="/x: Read-only file system"):
        list(map_tasks(fails, [1], 4.0, lambda _: None))
    assert capfd.readouterr().err == ""


def test_workers_find_no_modules_where_we_stand(ray_here: Any) -> None:
    """The checkout is on their path by its installation, behind all else."""

    def path() -> list[str]:
        return sys.path

    places = ray_here.get(ray_here.remote(num_cpus=0)(path).remote())
    assert os.getcwd() not in places[: next(n for n, place in enumerate(places) if place.endswith("site-packages"))]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in seconds, which a test sets; Ray answers, lives, and left is left."""
    now = [1_000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(health, "answers", lambda: True)
    monkeypatch.setattr(health, "_raylet_answers", lambda: True)
    monkeypatch.setattr(health, "abandon", lambda: None)
    return now


def test_a_raylet_that_died_ends_the_run(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(health, "abandon", lambda: left.append(True))
    watched = Health()
    clock[0] += 3
    watched.look()
    monkeypatch.setattr(health, "_raylet_answers", lambda: False)
    watched.look()  # looked a moment ago
    clock[0] += 3
    with pytest.raises(RunError, match=r"the raylet.*clipray run"):
        watched.look()
    assert left == [True]


def test_a_head_may_come_back_within_half_a_minute(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Health()
    for there in (False, True, False):
        monkeypatch.setattr(health, "answers", lambda there=there: there)
        clock[0] += 20
        watched.look()
    clock[0] += 20
    with pytest.raises(RunError, match="the head of the Ray cluster"):
        watched.look()


def test_workers_that_do_not_start_end_the_run(
    ray_here: Any, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Health()
    monkeypatch.setattr(health.ray, "wait", lambda refs, timeout: ([], refs))
    clock[0] += health.IDLE_S + 1
    watched.look()
    clock[0] += health.PROBE_S - 5
    watched.look()
    monkeypatch.setattr(health, "full_places", lambda: ["/tmp (temporary files)"])
    clock[0] += 6
    with pytest.raises(RunError, match=r"no worker of Ray starts.*/tmp .temporary files. is full"):
        watched.look()


def test_a_worker_that_starts_is_progress(ray_here: Any, clock: list[float]) -> None:
    watched = Health()
    for _ in range(3):
        clock[0] += health.IDLE_S + 1
        watched.look()
        assert watched._probe is not None
        ray_here.wait([watched._probe[1]])
        clock[0] += health.PROBE_S + 1
        watched.look()
        assert watched._probe is None


def test_encoders_that_die_before_their_first_row_end_the_run() -> None:
    sums = _Sums()
    for _ in range(health.STARTS + 1):
        sums.add({"starting": 1, "node": "n"})
    refuse_dying(sums.starts, workers=2)
    sums.add({"starting": 1, "node": "n"})
    with pytest.raises(RunError, match="workers die as they start: 10 in a row"):
        refuse_dying(sums.starts, workers=2)
    sums.add({"stage": "read", "rows": 1, "seconds": 1.0, "node": "n"})
    assert sums.starts == 10
    sums.add({"stage": "encode", "rows": 1, "seconds": 1.0, "node": "n"})
    assert sums.starts == 0


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_TMPDIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_long_tmpdir_is_left_for_a_short_one(no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("TMPDIR", str(no_token / ("x" * 100)))
    with ready_for_ray(said.append):
        assert os.environ["RAY_TMPDIR"] == "/tmp"
        assert len(f"/tmp{connect.SESSION}") <= connect.SOCKET_BYTES
    assert "RAY_TMPDIR" not in os.environ
    assert len(said) == 1
    monkeypatch.setenv("RAY_TMPDIR", str(no_token / ("x" * 100)))
    with (
        pytest.raises(PlanError, match=r"set RAY_TMPDIR to a path of at most 3[0-9] bytes"),
        ready_for_ray(said.append),
    ):
        pass
    assert len(os.environ["RAY_TMPDIR"]) > 100


@pytest.mark.parametrize("home", ["/proc/clipray", "/dev/null"])
def test_a_home_that_cannot_be_written_gets_a_token_of_its_own(
    home: str, no_token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ready_for_ray(print):
        assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", home)
    with ready_for_ray(print):
        token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    with ready_for_ray(print):
        assert os.environ["RAY_AUTH_TOKEN"] == token  # a Ray that this process starts later knows it
    assert os.environ.get("RAY_AUTH_MODE") != "disabled"


def test_too_little_room_is_one_line(no_token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_room(str(no_token / "not" / "yet"), "the output", 1)
    with pytest.raises(RunError, match=r"the output .*: \d+ MiB free, expected at least"):
        need_room(str(no_token / "not" / "yet"), "the output", 2**70)
    monkeypatch.setattr(connect, "ROOM_BYTES", 2**70)
    with pytest.raises(RunError, match="Ray's temporary folder"), ready_for_ray(print):
        pass
    assert ROOM_BYTES < 2**30
    assert connect.abandoned() is False


def test_a_raylet_that_is_there_answers(ray_here: Any) -> None:
    assert health._raylet_answers()
    Health().look()
