"""What the rows of a manifest are: images, texts, or pairs of both."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowSpec:
    """A kind of row, by the names of its columns.

    Attributes:
        table: the type of table that the rows become.
        key: the column of identities.
        sources: the columns that say what a row is made from. The table and its rejects hold them too, so that a row
            whose source changed is noticed.
        inline: the column that may hold the thing itself in place of a source; read, never kept.
        derived: whether rows get an identity made of their sources where the manifest has none.
        joins: columns with ids of other tables, which a manifest may have.
    """

    table: str
    key: str
    sources: tuple[str, ...]
    inline: str | None = None
    derived: bool = False
    joins: tuple[str, ...] = ()

    @property
    def content(self) -> tuple[str, ...]:
        """The columns that a row is made from: all of them, or, where one is inline, any."""
        return (*self.sources, self.inline) if self.inline else self.sources

    @property
    def ids(self) -> tuple[str, ...]:
        """The columns that name rows, its own and those of other tables; they may be whole numbers or UUIDs."""
        return (*(name for name in self.named if name.endswith("_id")), *self.joins)

    @property
    def named(self) -> tuple[str, ...]:
        """The columns that say which row it is."""
        return (self.key, *self.sources)


IMAGES = RowSpec("images", "image_id", ("uri",), "bytes")
TEXTS = RowSpec("texts", "text_id", ("text",), joins=("image_id",))
PAIRS = RowSpec("caption_scores", "pair_id", ("image_id", "caption"), derived=True)
ATTACKS = RowSpec("attacks", "image_id", ("uri",), "bytes")
CLOUDS = RowSpec("clouds", "cloud_id", ("uri",), "bytes")
REGION_IMAGES = RowSpec("region_pictures", "image_id", ("uri",), "bytes")
