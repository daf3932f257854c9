"""Step `index`: a vector column -> a FAISS index with a measured recall, and the table of its ids.

Files of a build have names of their own, and `_table.json` changes last: a build that is killed leaves the index before
it as it was. New files of the input are added to the index that is there, as long as it was trained on half of them.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.errors import DataError
from clipray.analysis.vector_index import choose_type, empty_index, mergeable, training_rows
from clipray.engine.cluster import ClusterResources
from clipray.errors import ClipRayError, JobError, StaleTableError
from clipray.inputs.index_reader import broken_files, hash_of
from clipray.inputs.vector_column import VectorColumn, open_vectors, refuse_other_space
from clipray.job import Index
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.storage.folder import TEMPORARY, Folder
from clipray.storage.parquet import RowGroup, chunked
from clipray.tables.digests import is_same_file

if TYPE_CHECKING:
    from clipray.engine.index_builder import IndexPart

OUTGROWN = 2  # times the rows that an index was built of: beyond it is built anew
OURS = re.compile(
    r"index-[0-9a-f]{8}\.faiss(\.lists)?|part-[0-9a-f]{8}-\d{12}\.parquet|"
    + re.escape(TEMPORARY)
    + ".*|"
    + re.escape(tables.DAMAGED)
)
"""Names of files that earlier builds may have left."""
SHARE = 0.5  # of the memory that Ray's workers may take


@dataclass(frozen=True)
class IndexStep(VectorStep[Index]):
    """A `Step`; see `VectorStep`."""

    table_type: ClassVar[str] = "index"

    queries: VectorColumn | None = None  # `settings.queries`, opened

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, **({"queries": self.queries.identity} if self.queries else {})}

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {**super().row_provenance, "metric": self.settings.metric}

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([*tables.arrow_schema("index"), *self.source.id_fields])

    def is_complete(self) -> bool:
        record = tables.record_to_go_on(self.table)
        return super().is_complete() and record is not None and has_index(self.table, record)

    def describe(self, cluster: ClusterResources) -> list[str]:
        return [f"{self.name}: {self._type(cluster.memory_bytes)[0]} of {self.description}"]

    def make(self, run: RunContext) -> Outcome:
        """Build or extend. Raises SchemaError, JobError: vectors that are not finite; too few for the type."""
        from clipray.engine.index_build import build
        from clipray.engine.index_builder import IndexSpec

        self._refuse_others()
        self.note_started()
        cluster, before = run.cluster(), self._extendable()
        index_type, on_disk = self._type(cluster.memory_bytes)
        if before is not None:
            index_type, on_disk = before.summary["type"], False
            run.say(f"{self.name}: {self.total - before.rows} new vectors are added to the {before.rows} of the index")
        parts, build_id = self._parts(before), os.urandom(4).hex()
        order = IndexSpec(
            self.source, index_type, self.settings.metric, self.settings.recall, self.settings.random_state, parts,
            self.table, f"index-{build_id}.faiss", self.queries, before.provenance["index_file"] if before else None,
            on_disk,
        )  # fmt: skip
        ticker = Ticker(run, self.name, self.total, f"building {index_type}")
        try:
            write = functools.partial(_write_ids, self, build_id)
            figures, shards = build(order, write, cluster, lambda n: ticker.at(n, 0))
        except DataError as error:
            raise JobError(f"{self.name}: {error}") from error
        except ClipRayError as error:
            raise type(error)(f"{self.name}: {error}") from error
        self._say_what_is_missed(run, index_type, {**before.summary, **figures} if before else figures)
        return self._measured(order.name, parts, before, shards, figures)

    def _refuse_others(self) -> None:
        for name in tables.shard_names(self.table):
            if not OURS.fullmatch(name):
                raise StaleTableError(f"{self.table.path(name)} is no file of this index; move it away")

    def _say_what_is_missed(self, run: RunContext, index_type: str, figures: dict[str, Any]) -> None:
        reached = figures.get("queries", figures).get("recall@10", 1.0)
        if reached < self.settings.recall:
            run.say(
                f"{self.name}: recall@10 is {reached:.3f}, below the wanted {self.settings.recall}, with the greatest "
                f"effort that {index_type} has; another `type` finds more"
            )
        if "parameter" not in figures:
            run.say(
                f"{self.name}: recall is not measured: {index_type} has no rows, or takes none, that could be held out"
            )

    def _type(self, memory_bytes: float) -> tuple[str, bool]:
        """The factory string, and whether the lists must lie on disk."""
        settings, source = self.settings, self.source
        bound = settings.memory_gib * 2**30 if settings.memory_gib else memory_bytes * SHARE
        index_type = settings.type
        if index_type == "auto":
            return choose_type(source.n_samples, source.n_features, bound), False
        too_large = bool(bound) and ",Flat" in index_type and source.n_samples * (4 * source.n_features + 8) > bound
        return index_type, too_large and mergeable(empty_index(index_type, source.n_features, settings.metric))

    def _extendable(self) -> tables.Record | None:
        """The record of an index of these very files and fewer, if it can be extended."""
        record = tables.record_to_go_on(self.table)
        if record is None or record.provenance["lists_file"] or not self._is_whole(record):
            return None
        before = record.provenance["indexed"]
        same = all(is_same_file(sign, self.source.files.get(path)) for path, sign in before["files"].items())
        return record if same and before["files"] and self.total <= OUTGROWN * before["built_of"] else None

    def _is_whole(self, record: tables.Record) -> bool:
        """Whether every byte of the index is as it was built."""
        if tables.noted_as_damaged(self.table) is not None or broken_files(self.table, record):
            return False
        names = [file["name"] for file in record.files]
        return len(tables.verify_shards(self.table, names)[0]) == len(names)

    def _parts(self, before: tables.Record | None) -> list[IndexPart]:
        """Parts in the order of their rows: those that are in the index, then the new ones."""
        from clipray.engine.index_builder import IndexPart

        known = before.provenance["indexed"]["pieces"] if before else {}
        old = sorted(
            ((known[_key(p)], p) for p in self.source.row_groups if _key(p) in known), key=lambda pair: pair[0]
        )
        parts = [IndexPart([row_group], first, _place(before, first)) for first, row_group in old] if before else []
        start = before.rows if before else 0
        for group in chunked([p for p in self.source.row_groups if _key(p) not in known], self.settings.rows_per_task):
            parts.append(IndexPart(group, start))
            start += sum(row_group.rows for row_group in group)
        return parts

    def _measured(
        self, name: str, parts: list[IndexPart], before: tables.Record | None, shards: list[tables.Shard], figures: dict[str, Any]
    ) -> Outcome:  # fmt: skip
        old = [tables.Shard(**file) for file in before.files] if before else []
        rows = sum(shard.rows for shard in [*old, *shards])
        if rows != figures["vectors"]:
            raise AssertionError(f"{rows} ids, but {figures['vectors']} vectors")
        sizes = figures.pop("files")
        sha256 = {file: hash_of(self.table, file) for file in sizes}
        indexed = {
            "files": self.source.files,
            "pieces": _first_rows(parts),
            "built_of": before.provenance["indexed"]["built_of"] if before else rows,
        }
        provenance = {
            "index_file": name,
            "lists_file": f"{name}.lists" if f"{name}.lists" in sizes else None,
            "sizes": sizes,
            "sha256": sha256,
            "width": self.source.n_features,
            "model": self.source.provenance.get("model"),
            "indexed": indexed,
        }
        # Where too few rows are new to measure anything, the effort and the recall of before stay.
        measured = before.summary if before else {}
        summary = {"trained_on": 0, **measured, **figures, "index_bytes": sum(sizes.values())}
        return Outcome([*old, *shards], summary, provenance=provenance)

    def tidy(self, record: tables.Record) -> None:
        """Remove the files of earlier builds."""
        keep = {*record.provenance["sizes"], *(file["name"] for file in record.files)}
        for file in set(self.table.sizes()) - keep:
            if OURS.fullmatch(file):
                self.table.remove(file)


def _write_ids(step: IndexStep, build_id: str, ids: pa.Table, numbers: np.ndarray, first_row: int) -> tables.Shard:
    """Write the ids of a part, where it is filled."""
    rows = pa.table([pa.array(numbers), *ids.columns], schema=step.schema)
    return step.write(rows, f"part-{build_id}-{first_row:012d}.parquet")


def has_index(folder: Folder, record: tables.Record) -> bool:
    """Whether all files of the index are there, with their sizes; files of a build that was killed may lie beside them."""
    sizes = folder.sizes()
    wanted = {**record.provenance["sizes"], **{file["name"]: file["bytes"] for file in record.files}}
    return all(sizes.get(name) == size for name, size in wanted.items())


def _place(record: tables.Record, row: int) -> tuple[str, int]:
    """The shard that holds a row of the table of ids, and where in it."""
    start = 0
    for file in record.files:
        if row < start + file["rows"]:
            return file["name"], row - start
        start += file["rows"]
    raise AssertionError(f"row {row} is in no shard of {record.rows} rows: this is a defect in clipray")


def _key(row_group: RowGroup) -> str:
    return f"{row_group.path}#{row_group.number}"


def _first_rows(parts: list[IndexPart]) -> dict[str, int]:
    """The first row of each row group, of all rows in the order in which they came."""
    first_rows: dict[str, int] = {}
    for part in parts:
        starts = itertools.accumulate((row_group.rows for row_group in part.row_groups), initial=part.first_row)
        first_rows.update(zip(map(_key, part.row_groups), starts, strict=False))
    return first_rows


def open_step(settings: Index, context: StepContext) -> IndexStep:
    """Open input and queries. Raises as `open_vectors`; JobError: faiss has no such type, or rows are too few."""
    source = open_vectors(settings.input, context.output)
    queries = open_vectors(settings.queries, context.output) if settings.queries else None
    if queries is not None:
        refuse_other_space(settings.name, queries, source)
    if settings.type != "auto":
        try:
            training_rows(empty_index(settings.type, source.n_features, settings.metric), source.n_samples)
        except DataError as error:
            raise JobError(f"{settings.name}: {source.name}: {error}") from error
    return IndexStep(settings, context.output, source, queries)
