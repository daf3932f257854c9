"""What the rows of a manifest are: pictures or texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of row, by the names of its columns.

    Attributes:
        table: the type of table that the rows become.
        key: the column of identities.
        source: the column that says what a row is made from. The table and its rejects hold it too, so that a row whose
            source changed is noticed.
        inline: the column that may hold the thing itself; read, never kept.
    """

    table: str
    key: str
    source: str
    inline: str | None = None

    @property
    def content(self) -> tuple[str, ...]:
        """The columns of which a manifest needs one."""
        return (self.source, self.inline) if self.inline else (self.source,)


PICTURES = Kind("images", "image_id", "uri", "bytes")
TEXTS = Kind("texts", "text_id", "text")
