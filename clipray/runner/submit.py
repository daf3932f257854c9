"""`clipray submit`, and the state and stop of submitted runs: a run as a job on a Ray cluster."""

from __future__ import annotations

import hashlib
import re
import shlex
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from clipray.engine.job_client import JobServer, Submission
from clipray.errors import ClusterError, JobError, Stopped
from clipray.job import Encoding, Job
from clipray.job.load import load_job, steps_of
from clipray.storage.folder import absolute
from clipray.storage.uris import is_local, is_relative

LEFT_OUT = (".git", ".venv", "venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "/runs", "/data")
"""Parts of the working directory that are not sent, in the syntax of .gitignore, whose own files are not sent either."""
MODULES = ("*.py", "*.pyc", "*.so")
"""Modules are not sent either: Ray puts the working directory first on the module path of its workers, where a
`random.py` among somebody's images must not run."""
STOP_S = 30  # for a run to write what is finished; Ray's own 3 are too few
STOPPED_CODE = 130


def submit(
    path: str,
    address: str,
    *,
    say: Callable[[str], None],
    write: Callable[[str], None],
    detach: bool = False,
    requirements: str | None = None,
    exclude: Sequence[str] = (),
    options: Sequence[str] = (),
) -> int:
    """Run a job file on the cluster whose job server is at `address`, and follow it.

    A run is known by its output: submitted again, it is followed if it is at work, and otherwise goes on.

    Args:
        say: takes lines of ours; write: takes what the job prints.
        requirements: file of packages that Ray installs on the nodes first.
        exclude: more that stays here of the working directory.
        options: of `clipray run`.

    Returns:
        The exit code: 0 only if the job succeeded.

    Raises:
        JobError: the job cannot run elsewhere. ClusterError: the cluster cannot be reached, or is lost.
    """
    job, inner = _portable(path)
    server = JobServer(address)
    run = mark(job.output)
    before = server.attempts(run)
    if before and not before[-1].over:
        attempt = before[-1].id
        say(f"{attempt} is running already ({before[-1].state.lower()})")
    else:
        name = re.sub(r"[^A-Za-z0-9]+", "-", job.name).strip("-")
        attempt = f"{name}-{run}-{len(before) + 1}"
        wanted = runtime_env(job, requirements, exclude)
        command = ["python", "-m", "clipray", "run", inner, "--address", "auto", *options]
        server.submit(attempt, shlex.join(command), wanted, {"job": job.name, "output": job.output})
        say(f"{attempt} {'goes on from an earlier one' if before else 'is submitted'} (Ray {server.ray_version})")
    say(f"  clipray status {job.output} --address {server.address}")
    say(f"  clipray stop {job.output} --address {server.address}")
    return 0 if detach else _outcome(_followed(server, attempt, write), say)


def plan(path: str, address: str, *, write: Callable[[str], None]) -> int:
    """What the job would do on the cluster whose job server is at `address`, looked up there; its exit code."""
    job, inner = _portable(path)
    server = JobServer(address)
    look = f"plan-{uuid.uuid4().hex}"
    command = shlex.join(["python", "-m", "clipray", "plan", inner, "--address", "auto"])
    server.submit(look, command, runtime_env(job, None, ()), {"job": job.name})
    return _outcome(_followed(server, look, write), lambda _: None)


def _followed(server: JobServer, attempt: str, write: Callable[[str], None]) -> Submission:
    try:
        return server.follow(attempt, write)
    except KeyboardInterrupt:
        raise Stopped(f"{attempt} is no longer followed, and goes on") from None


def state(output: str, address: str) -> Submission | None:
    """The state of a run's last submission. None if it was not submitted to this cluster."""
    return next(reversed(JobServer(address).attempts(mark(output))), None)


def stop(output: str, address: str) -> Submission:
    """Stop a run, which writes its finished rows first, and return its state. Raises ClusterError."""
    run = mark(output)
    server = JobServer(address)
    last = next(reversed(server.attempts(run)), None)
    if last is None:
        raise ClusterError(f"{server.address}: no run with the output {output} was submitted there")
    if last.over:
        return last
    server.stop(last.id)
    return server.follow(last.id, lambda _: None)


def mark(output: str) -> str:
    """The part of the ids of a run's submissions that they share: the same for the same output."""
    return hashlib.sha256(absolute(output).rstrip("/").encode()).hexdigest()[:10]


def runtime_env(job: Job, requirements: str | None, exclude: Sequence[str]) -> dict[str, Any]:
    """Ray's runtime environment: the working directory without data, packages to install, time to stop."""
    folder = Path.cwd()
    is_clone = (folder / "clipray" / "__init__.py").is_file()  # of which clipray's own modules are sent
    modules = tuple(f"/{pattern}" for pattern in MODULES) if is_clone else MODULES
    excludes = [*LEFT_OUT, *modules, *exclude]
    if is_local(job.output) and Path(absolute(job.output)).is_relative_to(folder):
        excludes.append(f"/{Path(absolute(job.output)).relative_to(folder)}")
    env: dict[str, Any] = {
        "working_dir": str(folder),
        "excludes": excludes,
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)},
    }
    if requirements is not None:
        if not Path(requirements).is_file():
            raise JobError(f"--requirements {requirements}: no such file")
        env["pip"] = requirements
    return env


def _portable(path: str) -> tuple[Job, str]:
    """The job, and the path of its file on the cluster. Raises JobError if it names files of this machine."""
    if not is_local(path):
        return load_job(path), path
    job, values = load_job(path), yaml.safe_load(Path(absolute(path)).read_text(encoding="utf-8"))
    manifests = [
        (f"{step.name}: manifest", url)
        for step in steps_of(job)
        if isinstance(step, Encoding)
        for url in step.manifest_paths
    ]
    for what, url in [("output", values["output"]), *manifests]:
        if is_relative(url):
            raise JobError(
                f"{path}: {what}: {url} is a path in this folder; nodes of a cluster need a URL (s3://…) or an absolute path on storage that they share"
            )
    full = Path(absolute(path))
    if not full.is_relative_to(Path.cwd()):
        raise JobError(
            f"{path} is not in the working directory, which travels to the cluster; expected it below {Path.cwd()}"
        )
    return job, str(full.relative_to(Path.cwd()))


def _outcome(end: Submission, say: Callable[[str], None]) -> int:
    if end.state == "SUCCEEDED":
        say(f"{end.id} succeeded")
        return 0
    if end.state == "STOPPED":
        say(f"{end.id} was stopped; the same `clipray submit` goes on from there")
        return STOPPED_CODE
    code = end.exit_code if end.exit_code is not None and 0 < end.exit_code < 256 else 1
    why = "" if end.exit_code else f": {' '.join(end.message.split())[:600]}"
    say(f"{end.id} failed{why or f' with exit code {end.exit_code}'}; the same `clipray submit` goes on from there")
    return code
