"""`clipray atlas RUN`: the map of a run as one Parquet file for embedding-atlas, with thumbnails and what is known of each row."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from clipray import tables
from clipray.errors import JobError, no_such
from clipray.inputs.key_index import ABSENT
from clipray.queries.row_columns import RowColumns
from clipray.report.image_sources import image_sources, thumbnails_of
from clipray.report.run_tables import RunTable, RunTables, finished_tables, open_run
from clipray.report.thumbnails import Thumbnails
from clipray.report.tiles import Tile
from clipray.runner.status import status
from clipray.storage.environment import environment_errors
from clipray.storage.folder import Folder, absolute
from clipray.storage.parquet import write_parquet_parts
from clipray.storage.uris import is_local

FILE = "atlas.parquet"
AT_ONCE = 4_096  # rows whose thumbnails are in memory
THREADS = 8
BYTES_PER_PX = 64  # of a thumbnail's side: 10 KB at 160 px
SAY_S = 10.0
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
NEIGHBORS = pa.struct([pa.field("ids", pa.list_(pa.int64())), pa.field("distances", pa.list_(pa.float32()))])


@dataclass(frozen=True)
class Atlas:
    """A file that is written. image, text, neighbors: the columns that hold these; "" for none."""

    path: str
    rows: int
    image: str = ""
    text: str = ""
    neighbors: str = ""

    @property
    def arguments(self) -> list[str]:
        """Of the command `embedding-atlas`."""
        columns = {"--x": "x", "--y": "y", "--neighbors": self.neighbors, "--image": self.image, "--text": self.text}
        return [self.path, *(word for option, column in columns.items() if column for word in (option, column))]


@environment_errors()
def write_atlas(
    url: str | os.PathLike[str], to: str | None = None, *, table: str = "", thumbnail_px: int = 160,
    say: Callable[[str], None] = lambda _: None,
) -> Atlas:  # fmt: skip
    """Write the map of the run at `url`, a few thousand rows at a time, by default to its `atlas.parquet`.

    Args:
        to: a local path. table: of the map, where there are several.
        thumbnail_px: longest side of the thumbnails; 0: none.
        say: told now and then how far it is.

    Raises:
        JobError: no run, no map, or several; `to` is not local.
    """
    output = Folder(absolute(os.fspath(url)))
    status(output.url)  # refuses what is no run
    path = absolute(to or (output.path(FILE) if output.local else f"{output.url}/{FILE}"))
    if not is_local(path):
        raise JobError(f"{path}: embedding-atlas reads local files: name one with `--to`")
    run = open_run(output, finished_tables(output), "label")
    writer = _Writer(run, _map_of(run, table), thumbnail_px)
    write_parquet_parts(writer.parts(say), path)
    return Atlas(
        path, writer.map.record.rows, "image" if writer.has_images else "", writer.text,
        "neighbors" if writer.neighbors_are_even else "",
    )  # fmt: skip


def command_of(atlas: Atlas) -> list[str] | None:
    """What starts embedding-atlas on the file, in this Python; None where it is not installed."""
    if importlib.util.find_spec("embedding_atlas") is None:
        return None
    return [sys.executable, "-m", "embedding_atlas.cli", *atlas.arguments]


def _map_of(run: RunTables, name: str) -> RunTable:
    maps = {table.name: table for table in run.of_type("map")}
    if name and name not in maps:
        raise JobError(f"{run.output.url}: {no_such('map', name, list(maps))}")
    if not maps:
        raise JobError(
            f"{run.output.url}: no map; add a step such as `project: {{input: images.clip, index: index}}` to the job, and run it"
        )
    if not name and len(maps) > 1:
        raise JobError(f"{run.output.url}: several maps; choose one with `--map`: {', '.join(maps)}")
    return maps[name] if name else next(iter(maps.values()))


@dataclass(eq=False)
class _Writer:
    """Makes the rows of the file, part by part.

    Attributes:
        neighbor_counts: different numbers of neighbours so far. has_images: whether a row had a thumbnail.
    """

    run: RunTables
    map: RunTable
    thumbnail_px: int
    neighbor_counts: set[int] = field(default_factory=set)
    has_images: bool = False

    @property
    def neighbors_are_even(self) -> bool:
        """Whether each row has as many, at least one: embedding-atlas takes no others."""
        return len(self.neighbor_counts) == 1 and 0 not in self.neighbor_counts

    @cached_property
    def rows(self) -> RowColumns:
        """All that the tables of the run know of each row."""
        ids = pa.concat_tables(tables.iter_table(self.map.folder.url, self.map.ids))
        return RowColumns(self.run.output, ids.select(self.map.ids))

    @cached_property
    def columns(self) -> dict[str, str]:
        """Columns of the run's tables, by their names in the file: words without dots, which need no quotes in SQL."""
        names: dict[str, str] = {}
        for shown, full in self.rows.columns.names.items():
            name = shown.replace(".", "_")
            while name in names or name in ("x", "y", "neighbors", "image"):
                name += "_"
            if self.rows.columns.all[full].table_type != "map":
                names[name] = full
        return names

    @property
    def text(self) -> str:
        texts = [name for name, full in self.columns.items() if self.rows.columns.all[full].table_type == "texts"]
        return "text" if "text" in texts else ""

    @cached_property
    def _first_row_of(self) -> np.ndarray:
        """(u,) int64: the first row of each id, in the order of their keys."""
        key_of_row = self.rows.numbers_by(self.map.ids[-1]).key_of_row
        first = np.empty(int(key_of_row.max(initial=-1)) + 1, np.int64)
        first[key_of_row[::-1]] = np.arange(len(key_of_row))[::-1]
        return first

    def parts(self, say: Callable[[str], None]) -> Iterator[pa.Table]:
        start, last_line_s = 0, time.monotonic()
        for shard in tables.iter_table(self.map.folder.url, [*self.map.ids, "x", "y", "neighbors"]):
            for offset in range(0, len(shard), AT_ONCE):
                places = shard.slice(offset, AT_ONCE)
                yield self._part(places, start)
                start += len(places)
                if time.monotonic() - last_line_s > SAY_S:
                    say(f"{start:,} of {self.map.record.rows:,} rows")
                    last_line_s = time.monotonic()

    def _part(self, places: pa.Table, start: int) -> pa.Table:
        """Rows of the map from `start` on, with all columns of the file."""
        part = places.select(["x", "y"])
        part = part.append_column("neighbors", self._neighbors(places["neighbors"].combine_chunks()))
        if self.thumbnail_px and self.map.ids != ("text_id",):
            part = part.append_column("image", self._images(places))
        frame = self.rows.frame(list(self.columns.values()), offset=start, limit=len(places))
        frame.columns = list(self.columns)
        clusters = [name for name, full in self.columns.items() if self._is_cluster(full)]
        for name, column in frame.with_columns(pl.col(clusters).cast(pl.String)).to_dict().items():
            part = part.append_column(name, pa.array(column.to_arrow()))
        return part

    def _is_cluster(self, full: str) -> bool:
        """Numbers of clusters name groups: as strings they get a colour each."""
        column = self.rows.columns.all[full]
        return (column.table_type, column.source) == ("clusters", "cluster_id")

    def _neighbors(self, neighbors: pa.StructArray) -> pa.Array:
        """With the numbers of rows in the file, as embedding-atlas wants them, in place of ids."""
        ids, distances = (pc.struct_field(neighbors, name) for name in ("ids", "distances"))
        flat, lengths = pc.list_flatten(ids), tables.numbers(pc.list_value_length(ids).fill_null(0))
        positions = self.rows.numbers_by(self.map.ids[-1]).keys.positions(flat)
        known, owners = positions != ABSENT, np.repeat(np.arange(len(ids)), lengths)
        counts = np.bincount(owners[known], minlength=len(ids))
        self.neighbor_counts |= set(np.unique(counts).tolist())
        offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
        values = (pa.array(self._first_row_of[positions[known]]), pc.list_flatten(distances).filter(pa.array(known)))
        lists = [pa.ListArray.from_arrays(offsets, v, f.type) for v, f in zip(values, NEIGHBORS, strict=True)]
        return pa.StructArray.from_arrays(lists, fields=list(NEIGHBORS))

    def _images(self, places: pa.Table) -> pa.Array:
        keys = [Tile(row).key for row in places.select(self.map.ids).to_pylist()]
        thumbnails = Thumbnails(self.thumbnail_px, BYTES_PER_PX * self.thumbnail_px)
        webp = thumbnails_of(image_sources(self.run, keys)[0], thumbnails, THREADS)
        images = [
            {"bytes": data, "path": f"{key[1] or key[0]}.webp"} if (data := webp.get(key, (None, ""))[0]) else None
            for key in keys
        ]
        self.has_images |= any(images)
        return pa.array(images, IMAGE)
