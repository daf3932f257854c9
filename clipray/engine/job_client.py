"""The job server of a Ray cluster, through Ray's own client: submit, follow, stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipray.errors import ClusterError, last_line

ANSWER_S = 10.0
RAY_VERSIONS = ((2, 60), (2, 64))  # from, to; the second excluded, as in pyproject.toml
TRIES, AGAIN_S = 10, 3.0  # to find a head again whose connection broke
OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submission:
    """One submission of a run. `state`: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED, as Ray says it."""

    id: str
    state: str
    message: str = ""
    exit_code: int | None = None

    @property
    def over(self) -> bool:
        return self.state in OVER


class JobServer:
    """A head that answers.

    Attributes:
        address: `http://HOST:8265`. ray_version: of the cluster.

    Raises:
        ClusterError: nobody answers, or who answers asks for another token, or is of a version that cannot do the work.
    """

    def __init__(self, address: str) -> None:
        self.address = _url(address)
        token = _token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.ray_version = _version(self.address, headers)
        self._client = _client(self.address, headers)

    def attempts(self, run: str) -> list[Submission]:
        """The submissions of a run, oldest first. Their ids end in `-RUN-1`, `-RUN-2`, …"""
        with self._explained():
            jobs = {job.submission_id or "": job for job in self._client.list_jobs()}
        numbers = {int(match[1]): id_ for id_ in jobs if (match := re.search(rf"-{run}-(\d+)$", id_))}
        return [_submission(jobs[numbers[n]]) for n in sorted(numbers)]

    def submit(self, attempt: str, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Pack the working directory, send it and start the job. An id is taken once and for all."""
        with self._explained():
            self._client.submit_job(
                submission_id=attempt, entrypoint=entrypoint, runtime_env=runtime_env, metadata=metadata
            )

    def look(self, attempt: str) -> Submission:
        with self._explained():
            return _submission(self._client.get_job_info(attempt))

    def stop(self, attempt: str) -> None:
        """Ask the job to stop with SIGTERM: the run then writes its finished rows."""
        with self._explained():
            self._client.stop_job(attempt)

    def follow(self, attempt: str, write: Callable[[str], None]) -> Submission:
        """Hand on what the job prints until it is over; returns how it ended. Raises ClusterError: the head is gone."""
        done = 0  # characters handed on: a new connection starts from the beginning

        async def tail() -> None:
            nonlocal done
            seen = 0
            async for text in self._client.tail_job_logs(attempt):
                write(text[max(0, done - seen) :])
                seen += len(text)
                done = max(done, seen)

        for _ in range(TRIES):
            with contextlib.suppress(*_broken()):
                asyncio.run(tail())
            with contextlib.suppress(ClusterError):
                if (submission := self.look(attempt)).over:
                    return submission
            time.sleep(AGAIN_S)
        raise ClusterError(
            f"{self.address}: lost the connection to {attempt}; it may still be running: ask `clipray status` again later"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _broken() as error:
            raise ClusterError(f"{self.address}: {last_line(error)}") from error


def _submission(job: Any) -> Submission:
    return Submission(job.submission_id, str(job.status.value), job.message or "", job.driver_exit_code)


def _broken() -> tuple[type[BaseException], ...]:
    """What Ray's client lets through when a connection breaks."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    return RuntimeError, ValueError, OSError, AuthenticationError, aiohttp.ClientError, requests.RequestException


def _url(address: str) -> str:
    if "://" not in address and ":" in address:
        address = f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f"{address}: expected the job server of a Ray head, such as http://10.0.0.1:8265")
    return address.rstrip("/")


def _token() -> str | None:
    """The token that Ray itself would use, unless RAY_AUTH_MODE says that there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


def _version(address: str, headers: dict[str, str]) -> str:
    """Ray's version on the cluster; asked with a limit of time, which Ray's client has not."""
    try:
        asked = urllib.request.Request(f"{address}/api/version", headers=headers)
        with urllib.request.urlopen(asked, timeout=ANSWER_S) as answer:
            version = str(json.load(answer)["ray_version"])
    except urllib.error.HTTPError as error:
        raise ClusterError(_refusal(address, error.code, bool(headers))) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ClusterError(f"{address}: no answer from a Ray job server: {reason}") from error
    except (KeyError, TypeError) as error:
        raise ClusterError(f"{address}: what answers there is no Ray job server") from error
    low, high = RAY_VERSIONS
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        raise ClusterError(
            f"{address}: the cluster runs Ray {version}; this clipray needs {low[0]}.{low[1]} or later, below {high[0]}.{high[1]}"
        )
    return version


def _refusal(address: str, status: int, had_token: bool) -> str:
    help_ = "put the cluster's token (on its head: `ray get-auth-token`) into ~/.ray/auth_token or RAY_AUTH_TOKEN"
    if status in (401, 403):
        problem = "ours is not its own" if had_token else "there is none here"
        return f"{address}: the cluster asks for a token, and {problem} ({status}): {help_}"
    return f"{address}: what answers there is no Ray job server (HTTP {status})"


def _client(address: str, headers: dict[str, str]) -> Any:
    try:
        import aiohttp  # noqa: F401
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ClusterError(f"submitting needs `pip install clipray[cluster]`: {error}") from error
    for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)
    # In Ray 2.60 these take precedence over the address that is given.
    kept = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        return JobSubmissionClient(address, headers=headers)
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"{address}: {last_line(error)}") from error
    finally:
        os.environ.update({name: value for name, value in kept.items() if value is not None})
