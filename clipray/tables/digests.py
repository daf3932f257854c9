"""Digests of the files that a table is made from: when one changes, the table is made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BY_CONTENT = "sha256:"
Files = list[dict[str, Any]]  # as a record lists them


@dataclass(frozen=True)
class Digest:
    """Of some files.

    Attributes:
        before: of their names, rows and sizes, as versions before wrote it.
        content: of their hashes; "" where the hash of one is not known.
    """

    before: str
    content: str = ""

    def like(self, stored: object) -> str:
        """As a table has it, where it is still the same; else by content, where that is known."""
        return self.before if stored == self.before or not self.content else self.content

    def is_that(self, stored: object) -> bool:
        """Whether the files are those that a table was made from."""
        return stored == self.like(stored)


def digest_of(values: Any) -> str:
    """First 16 hex digits of the SHA-256 of plain values, such as names, rows and bytes of files."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def plain(digest: str) -> Digest:
    """Of what has one digest only, such as Parquet of somebody else."""
    return Digest(digest, digest)


def files_digest(files: Sequence[Mapping[str, Any]]) -> Digest:
    """Of the files that a commit record lists."""
    before = digest_of([(file["name"], file["rows"], file["bytes"]) for file in files])
    if not all(file.get("sha256") for file in files):
        return Digest(before)
    return Digest(before, BY_CONTENT + digest_of([(file["name"], file["sha256"]) for file in files]))


def without_hashes(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What versions before wrote of the files of a record."""
    return [{name: file[name] for name in ("name", "rows", "bytes")} for file in files]


def combined(inputs: Sequence[Digest | str | Files | None]) -> Digest:
    """Of several inputs: by content where that is known of all.

    Args:
        inputs: digests, or the files that a record lists; a string is a digest that is stored, and the same in both.
    """
    digests = [_input_digest(each) for each in inputs]
    # Of a record's files, versions before wrote all that there was.
    before = [
        without_hashes(i) if isinstance(i, list) else d and d.before for i, d in zip(inputs, digests, strict=True)
    ]
    if not all(digest is None or digest.content for digest in digests):
        return Digest(digest_of(before))
    return Digest(digest_of(before), BY_CONTENT + digest_of([digest and digest.content for digest in digests]))


def _input_digest(each: Digest | str | Files | None) -> Digest | None:
    if isinstance(each, str):
        return plain(each)
    return files_digest(each) if isinstance(each, list) else each


def file_version(file: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells whether a file that a record lists is still the same: name, rows, bytes, and its hash where that is known."""
    return tuple(file[name] for name in ("name", "rows", "bytes", "sha256") if name in file)


def is_same_file(version: str, now: str | None) -> bool:
    """Whether a file is still the same, by two versions as JSON; one that a version before wrote knows no hash."""
    if now is None:
        return False
    recorded, current = json.loads(version), json.loads(now)
    return bool(recorded == current[: len(recorded)])
