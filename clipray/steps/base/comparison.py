"""Whether a manifest's rows still hold what a table was made from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from clipray.inputs.content_versions import CONTENT_HASH, Contents, with_contents
from clipray.inputs.key_index import digest_of_hashes, is_of_another_hash
from clipray.inputs.manifest import Manifest
from clipray.inputs.row_index import RowIndex


@dataclass(frozen=True)
class Comparison:
    """A manifest and the table that earlier runs made or began of it.

    Attributes:
        before: the facts noted with that table, see `facts`; None where none was begun.
        named: columns that the job itself names; one of them may be called `content_hash`.
        schemes: URI schemes whose files are compared, if the job asks for that.
    """

    manifest: Manifest
    scan: RowIndex
    before: dict[str, Any] | None
    named: frozenset[str]
    schemes: tuple[str, ...]

    @functools.cached_property
    def contents(self) -> Contents | None:
        """How the contents of rows are compared; None for a table without `content_hash`.

        A table has that column from the start or never, so all its shards have the same columns.
        """
        inline = self.manifest.spec.inline
        if inline is None or CONTENT_HASH in self.named:
            return None
        is_inline, version = inline in self.manifest.schema.names, self.manifest.layout.version
        told = is_inline or bool(version)
        contents = Contents(inline if is_inline and not version else None, () if told else self.schemes, version)
        hashed = bool(contents.columns) if self.before is None else self.before.get("content_hash")
        return contents if hashed else None

    @functools.cached_property
    def versions_before(self) -> dict[str, str]:
        """By URL, the versions of the manifest's files that all rows on disk match."""
        if self.before is None:  # no row is on disk
            return self.scan.versions
        return self.before.get("manifest_versions") or {}

    @functools.cached_property
    def changed_files(self) -> frozenset[int]:
        """Numbers of the manifest's files that have changed since all rows on disk were compared."""
        now, before = self.scan.versions, self.versions_before
        return frozenset(n for n, url in enumerate(self.manifest.urls) if not now[url] or now[url] != before.get(url))

    @property
    def digest(self) -> str:
        """Of the files behind the URIs, at the first call; empty where they are not compared."""
        return self._looked[0]

    @functools.cached_property
    def _looked(self) -> tuple[str, int]:
        """`digest`, and the number of rows whose files could not be seen."""
        if self.contents is None or not self.contents.schemes:
            return "", 0
        rows = with_contents(self.manifest, self.scan, self.contents, range(len(self.manifest.urls)))
        return digest_of_hashes(rows.sources), int((rows.sources == self.scan.sources).sum())

    @property
    def changed(self) -> bool:
        """Whether the sources of a finished table may have changed."""
        if self.digest:
            before = (self.before or {}).get("sources_digest")
            return before is None or (before != self.digest and not is_of_another_hash(before))
        return self.contents is not None and bool(self.changed_files)

    def scan_with_contents(self) -> RowIndex:
        """The manifest's rows, with the contents that are compared with those of earlier runs."""
        if self.contents is None or self.before is None:
            return self.scan
        files = range(len(self.manifest.urls)) if self.contents.schemes else self.changed_files
        return with_contents(self.manifest, self.scan, self.contents, files) if files else self.scan

    def facts(self, versions: dict[str, str]) -> dict[str, Any]:
        """What is noted with the table. versions: of the manifest's files that all rows on disk match."""
        if self.contents is None:
            return {}
        return {
            "content_hash": True,
            "manifest_versions": versions,
            **({"sources_digest": self.digest} if self.digest else {}),
        }

    @property
    def caveat(self) -> str:
        """Why some files are not compared although the job asks for that; empty where all are."""
        if not self.schemes:
            return ""
        if self.contents and self.contents.schemes:
            unseen, rows = self._looked[1], len(self.scan.keys)
            note = f"`check_sources`: {unseen} of {rows} files cannot be seen: gone, not listed, or over http"
            return note if unseen else ""
        if self.contents and self.contents.version:
            return "`check_sources` looks at no file, as the manifest has their versions, which are compared"
        if self.contents:
            return "`check_sources` looks at no file, as the manifest has a column of inline content, which is compared"
        return "`check_sources` looks at no file, as the table was begun without it; `--fresh` makes it anew"
