"""Digests of the files that a table is made from: when one changes, the table is made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BY_CONTENT = "sha256:"


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


def combined(digests: Sequence[Digest | str | None], before: Sequence[Any] | None = None) -> Digest:
    """Of several inputs: by content where that is known of all.

    Args:
        digests: a string is one that is stored in a record, and the same in both.
        before: what versions before wrote in place of each; by default its own `before`.
    """
    known = [plain(digest) if isinstance(digest, str) else digest for digest in digests]
    if before is None:
        before = [digest and digest.before for digest in known]
    if not all(digest is None or digest.content for digest in known):
        return Digest(digest_of(before))
    return Digest(digest_of(before), BY_CONTENT + digest_of([digest and digest.content for digest in known]))


def file_version(file: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells whether a file that a record lists is still the same: name, rows, bytes, and its hash where that is known."""
    return tuple(file[name] for name in ("name", "rows", "bytes", "sha256") if name in file)


def is_same_file(version: str, now: str | None) -> bool:
    """Whether a file is still the same, by two versions as JSON; one that a version before wrote knows no hash."""
    if now is None:
        return False
    recorded, current = json.loads(version), json.loads(now)
    return bool(recorded == current[: len(recorded)])
