"""Steps over finished tables: how they begin, what they write, what they commit.

Such a step has one table, and often a companion table, which is finished first.
"""

from __future__ import annotations

import functools
import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.engine.cluster import ClusterResources
from clipray.errors import SchemaError
from clipray.inputs.vector_column import VectorColumn
from clipray.job.load import changes
from clipray.steps.base.step import AnySettings, RunContext, Step
from clipray.storage.folder import Folder, absolute
from clipray.tables.digests import Digest
from clipray.tables.metrics import Metric, write_metrics
from clipray.tables.started import read_started, write_started

FILE = "part-000000.parquet"  # of a table of one shard


@dataclass(frozen=True)
class Outcome:
    """What a step made of its inputs, to be committed.

    Attributes:
        shards: of its table.
        summary: figures for the table's record. metrics: rows for the table `metrics`; None: the step measures nothing.
        provenance: for the record, beside the metadata of every shard.
    """

    shards: Sequence[tables.Shard]
    summary: Mapping[str, Any] = field(default_factory=dict)
    metrics: Iterable[Metric] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableStep(Step[AnySettings]):
    """A `Step` over finished tables.

    Attributes:
        table_type, companion_type: of its table and of the one beside it, if there is one: one of `schemas/`.
        row_for_row: the table has a row for each that comes in.
    """

    table_type: ClassVar[str]
    companion_type: ClassVar[str] = ""
    row_for_row: ClassVar[bool] = True

    @property
    @abstractmethod
    def inputs_digest(self) -> Digest:
        """Of the files that come in."""

    @property
    @abstractmethod
    def inputs(self) -> str | list[str]:
        """Names of the inputs, as the job has them."""

    @property
    def description(self) -> str:
        """What there is to do, in one line for `clipray plan`; a step whose plan depends on the cluster has `describe`."""
        return ""

    @abstractmethod
    def make(self, run: RunContext) -> Outcome:
        """Write the shards that are missing."""

    def tidy(self, record: tables.Record) -> None:
        """Remove what only an unfinished table needs."""

    @functools.cached_property
    def digest(self) -> str:
        """Of the files that come in, as the table has it; when it changes, the table is made again, or extended."""
        record = tables.record_to_go_on(self.table)
        stored = record.inputs if record else read_started(self.table) or {}
        return self.inputs_digest.like(stored.get("digest"))

    @property
    def schema(self) -> pa.Schema:
        return tables.arrow_schema(self.table_type)

    @property
    def companion(self) -> Folder:
        return self.output.sub(self.settings.tables[1])

    @functools.cached_property
    def shard_metadata(self) -> dict[str, Any]:
        """Provenance of the rows, for every shard."""
        versions = {"clipray": __version__, "numpy": np.__version__}
        return {"fingerprint": self.fingerprint, **self.row_provenance, "versions": versions}

    def describe(self, cluster: ClusterResources) -> list[str]:  # noqa: ARG002 - of steps whose plan depends on it
        return [f"{self.name}: {self.description}"]

    def write_table(self, run: RunContext) -> tables.Record:
        """Make what is missing, commit. Raises ClipRayError: the inputs are not what the step needs."""
        began = time.monotonic()
        run.events.write("step_started", step=self.name, rows=self.total, fingerprint=self.fingerprint)
        outcome = self.make(run)
        rows = sum(shard.rows for shard in outcome.shards)
        if self.row_for_row and rows != self.total:
            raise AssertionError(f"rows in = {self.total}, but {rows} written")
        if outcome.metrics is not None:
            write_metrics(self.output, self.name, outcome.metrics, self.shard_metadata)
        seconds = time.monotonic() - began
        record = self.commit(
            self.table, self.table_type, self.schema, outcome.shards, summary=dict(outcome.summary), **self._facts(outcome.provenance),
            seconds=round(seconds, 2), rows_per_s=round(self.total / max(seconds, 1e-9), 2),
        )  # fmt: skip
        self.tidy(record)
        return record

    def begin(self, *, keep: bool = True) -> None:
        """Open the table for writing; `keep`: the shards that are there, and the companion."""
        if keep:
            tables.reopen(self.table)
        else:
            if self.companion_type:
                tables.clear(self.companion, self.companion_type)
            tables.clear(self.table, self.table_type)
        self.note_started()

    def note_started(self) -> None:
        """Note in the table's folder what is made there."""
        started_at = (read_started(self.table) or {}).get("started_at", tables.now())
        facts = {"settings": self.identity, "fingerprint": self.fingerprint, "digest": self.digest}
        write_started(self.table, {**facts, "started_at": started_at})

    def write(self, data: pa.Table, name: str = FILE) -> tables.Shard:
        """Write a shard of the table."""
        return tables.write_shard(self.table, name, self.table_type, data, self.shard_metadata)

    def write_companion(
        self, data: pa.Table, summary: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None
    ) -> None:
        """Write the companion table, in one shard, and its record. provenance: beside the metadata of every shard."""
        folder, table_type = self.companion, self.companion_type
        tables.clear(folder, table_type)
        shard = tables.write_shard(folder, FILE, table_type, data, {**self.shard_metadata, **(provenance or {})})
        self.commit(folder, table_type, data.schema, [shard], summary=dict(summary or {}), **self._facts(provenance))

    def finished_companion(self) -> tables.Record | None:
        """The record of the companion, where this very step has written it already, and it is whole."""
        folder = self.companion
        record = tables.whole_record(folder)
        is_ours = (
            record and tables.verify_shards(folder, [FILE])[0] and tables.shard_is(folder, FILE, self.shard_metadata)
        )
        return record if is_ours else None

    def _facts(self, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
        inputs = {"rows": self.total, "digest": self.digest, "input": self.inputs}
        return {"inputs": inputs, "provenance": {**self.shard_metadata, **(provenance or {})}}


@dataclass(frozen=True)
class VectorStep(TableStep[AnySettings]):
    """A `TableStep` over a vector column."""

    source: VectorColumn

    @property
    def total(self) -> int:
        return self.source.n_samples

    @property
    def inputs_digest(self) -> Digest:
        return self.source.digest

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {"input": self.source.identity}

    @property
    def row_provenance(self) -> dict[str, Any]:
        source = self.source
        return {"input": {"name": source.name, "digest": self.digest, **source.identity}, "space": source.space}

    @property
    def inputs(self) -> str:
        return self.source.name

    @property
    def description(self) -> str:
        source = self.source
        return f"{source.n_samples} vectors of {source.n_features} from {source.name}"

    @property
    def schema(self) -> pa.Schema:
        """Identities, then the fixed columns."""
        return pa.schema([*self.source.id_fields, *tables.arrow_schema(self.table_type)])

    def of_vectors(self, width: int, element: str) -> pa.Schema:
        """Identities, then vectors in a column of the input's name."""
        vectors = pa.field(self.source.column, tables.vector_type(width, element), nullable=False)
        return pa.schema([*self.source.id_fields, vectors])


def open_fit(fit: str, suffix: str, output: Folder) -> tuple[Folder, tables.Record]:
    """What another step fitted, as its companion: the folder and its record. Raises SchemaError: it is not finished."""
    folder = Folder(f"{absolute(fit) if '/' in fit else output.sub(fit).url}_{suffix}")
    return folder, tables.finished(folder, f"fit {fit}")


def refuse_other_fit(step: str, fit: str, width: int, space: Mapping[str, Any], source: VectorColumn) -> None:
    """Raises SchemaError where `fit` was made of vectors of another width or space than those of `source`."""
    if width != source.n_features:
        raise SchemaError(f"{step}: {fit} was fitted on vectors of {width}, {source.name} has {source.n_features}")
    if space and source.space and space != source.space:
        raise SchemaError(
            f"{step}: {fit} was fitted in another space than {source.name}: {'; '.join(changes(space, source.space))}"
        )
