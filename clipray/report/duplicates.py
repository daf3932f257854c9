"""The section on near duplicates: the largest groups side by side, and which row of each is kept."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from clipray.report.run_tables import RunTable, RunTables
from clipray.report.section import LeftOut, Section
from clipray.report.tiles import Album, Tile

TITLE = "Near duplicates"
TABLES = 4  # of duplicates
GROUPS = 24  # in all: of each table its largest groups


@dataclass(frozen=True)
class Group:
    """Rows that are nearly the same. tiles: the kept one, then the others, the likest to it first."""

    size: int
    tiles: list[Tile]


@dataclass(frozen=True)
class Duplicates:
    """A table of duplicates.

    Attributes:
        rows: in groups, of which all but one a group are `dropped`. similarity: the cosine from which rows count.
        rest: groups that are not shown.
    """

    name: str
    rows: int
    dropped: int
    similarity: float | None
    groups: list[Group]
    rest: int


def duplicates_section(run: RunTables, album: Album, examples: int) -> Section | LeftOut:
    """The largest groups of each table of duplicates, up to `examples` rows of each."""
    tables = run.of_type("duplicates")
    if not tables:
        return LeftOut(TITLE, "no table of duplicates; a step `deduplicate` makes one")
    most = GROUPS // len(tables[:TABLES])
    shown = [_duplicates(table, album, most, examples) for table in tables[:TABLES]]
    headlines = tuple((f"{each.dropped:,}", f"near duplicates in {each.name}") for each in shown[:1])
    values = {"duplicates": shown, "more": [table.name for table in tables[TABLES:]]}
    return Section("duplicates", TITLE, values, tuple(each.name for each in shown), headlines)


def _duplicates(table: RunTable, album: Album, most: int, examples: int) -> Duplicates:
    sizes = table.scan("group_id").group_by("group_id").agg(size=pl.len())
    largest = sizes.top_k(most, by=["size", "group_id"], reverse=[False, True]).collect(engine="streaming")
    largest = largest.sort("size", "group_id", descending=[True, False])
    members = _members(table, largest["group_id"], examples)
    groups = []
    for number, size in largest.select("group_id", "size").iter_rows():
        rows = members.filter(pl.col("group_id") == number).to_dicts()
        groups.append(Group(size, [_tile(album, table, row) for row in rows]))
    n_groups = table.scan("group_id").select(pl.col("group_id").n_unique()).collect(engine="streaming").item()
    in_groups, similarity = table.record.rows, table.record.settings.get("similarity")
    return Duplicates(table.name, in_groups, in_groups - n_groups, similarity, groups, n_groups - len(groups))


def _tile(album: Album, table: RunTable, row: dict[str, object]) -> Tile:
    ids = {name: str(row[name]) for name in table.ids}
    return album.tile(ids, "kept", "hit") if row["kept"] else album.tile(ids, f"{row['similarity']:.3f}")


def _members(table: RunTable, groups: pl.Series, examples: int) -> pl.DataFrame:
    """Rows of these groups, of each the kept one and the likest to it."""
    members = pl.DataFrame()
    for rows in table.shards(*table.ids, "group_id", "kept", "similarity"):
        of_groups = rows.filter(pl.col("group_id").is_in(groups.implode()))
        members = pl.concat([members, of_groups], how="diagonal")
        members = members.sort("kept", "similarity", table.ids[-1], descending=[True, True, False])
        members = members.group_by("group_id", maintain_order=True).head(examples)
    return members
