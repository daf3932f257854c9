"""Errors that a person can act on: each message says what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, for a message: `'a', 'b' and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def no_such(what: str, name: str, names: Sequence[str]) -> str:
    """That something of this name is not there, with the nearest one, for a message."""
    nearest = difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"no {what} {name!r}, found: {', '.join(names)}{meant}"


class ClipRayError(Exception):
    """Base of every error that clipray raises on purpose; the command prints it as one line."""

    exit_code = 1


class JobError(ClipRayError):
    """The job file or a command's argument is wrong."""

    exit_code = 2


class ManifestError(ClipRayError):
    """The manifest is missing, unreadable or lacks a column."""

    exit_code = 2


class SchemaError(ClipRayError):
    """A table does not hold what its schema says, or two tables of different spaces would be mixed."""


class DamagedError(SchemaError):
    """A file of a table has changed since it was written."""


class StaleTableError(ClipRayError):
    """A table exists that was made with other settings than the job's."""


class ModelError(ClipRayError):
    """The model is unknown, its weights cannot be had, or it fails its own check."""

    exit_code = 2


class PlanError(ClipRayError):
    """The job cannot run on this machine or cluster: it would hang or never start."""

    exit_code = 2


class StorageError(ClipRayError):
    """Storage denies us, has no such bucket, or does not answer."""

    exit_code = 2


class ClusterError(ClipRayError):
    """A cluster's job server cannot be reached, refuses us, or does not know what it is asked for."""

    exit_code = 2


class RejectRateError(ClipRayError):
    """More rows were rejected than `max_reject_rate` allows; everything written is kept."""


class RunError(ClipRayError):
    """The run could not go on: workers keep dying, or another run holds the same output."""


class Stopped(ClipRayError):
    """The run was stopped by a signal; what is written is kept and the next run goes on from there."""

    exit_code = 130


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def last_line(error: BaseException) -> str:
    """The same, in at most 600 characters, of an error that may hold a traceback: its last line. Of no words, the class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line or line.startswith("File ") for line in lines):
        lines = lines[-1:]
    return " ".join(lines)[:600] or type(error).__name__
