"""What the steps over finished tables have in common: where they stand, how they begin, what they commit.

Such a step has one table, and often others beside it, which lie there before its own is finished.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa

from clipray import __version__, tables
from clipray.errors import SchemaError
from clipray.inputs.vector_column import VectorColumn
from clipray.job import StepSettings
from clipray.job.load import changes, fingerprint, step_kind
from clipray.steps.base.step import RunContext, State, refuse_stale, standing
from clipray.storage.folder import Folder, absolute
from clipray.tables.digests import Digest
from clipray.tables.metrics import Metric, are_damaged, write_metrics
from clipray.tables.started import read_started, write_started

AnySettings = TypeVar("AnySettings", bound=StepSettings)


@dataclass(frozen=True)
class TableStep(ABC, Generic[AnySettings]):
    """A `Step` whose inputs are opened.

    Attributes:
        kind: the type of its table, one of `schemas/`.
    """

    kind: ClassVar[str]

    settings: AnySettings
    output: Folder

    @property
    @abstractmethod
    def total(self) -> int:
        """Rows that come in."""

    @property
    @abstractmethod
    def inputs_digest(self) -> Digest:
        """Of the files that come in."""

    @functools.cached_property
    def digest(self) -> str:
        """Of the files that come in, as the table has it; when it changes, the table is to be made again, or extended."""
        record = tables.record_to_go_on(self.table)
        stored = record.inputs if record else read_started(self.table) or {}
        return self.inputs_digest.like(stored.get("digest"))

    @property
    @abstractmethod
    def input_fingerprint(self) -> dict[str, Any]:
        """What made the inputs, by the settings that name them."""

    @property
    @abstractmethod
    def made(self) -> dict[str, Any]:
        """What beside the settings made the rows, for the metadata of every shard."""

    @property
    @abstractmethod
    def inputs(self) -> Any:
        """Names of the inputs, as the job has them."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Of the table."""

    @abstractmethod
    def make(self, run: RunContext, began: float) -> tables.Record:
        """Write what is missing, commit. began: when, by `time.monotonic`."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def table(self) -> Folder:
        return self.output.sub(self.name)

    @property
    def beside(self) -> Folder:
        """The table beside its own, of steps that have one."""
        return self.output.sub(self.settings.tables[1])

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        version = tables.table_schema(self.kind)["version"]
        own = {"step": step_kind(self.settings), "schema_version": version}
        return {**own, **self.input_fingerprint, **self.settings.identity()}

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @functools.cached_property
    def stamp(self) -> dict[str, Any]:
        """Provenance of the rows."""
        versions = {"clipray": __version__, "numpy": np.__version__}
        return {"fingerprint": self.fingerprint, **self.made, "versions": versions}

    def inspect(self, *, count: bool = True) -> State:  # noqa: ARG002 - whole files are made, none is counted
        state = standing(self.table, self.identity, self.digest)
        if state.kind == "finished" and are_damaged(self.output, self.name):
            return State("partial")
        for name in self.settings.tables[1:] if state.kind == "finished" else ():
            folder = self.output.sub(name)
            record = tables.record_to_go_on(folder)
            if record is None or not tables.intact(folder, record):
                return State("partial")
        return state

    def run(self, run: RunContext) -> tables.Record:
        """Make what is missing, commit.

        Raises:
            StaleTableError: the table was made with other settings.
            ClipRayError: the inputs are not what the step needs.
        """
        refuse_stale(self.table, self.inspect())
        began = time.monotonic()
        run.events.write("step_started", step=self.name, rows=self.total, fingerprint=self.fingerprint)
        return self.make(run, began)

    def begin(self, *, keep: bool = True) -> None:
        """Open the table for writing; `keep`: the shards that are there."""
        before = read_started(self.table) or {}
        if keep:
            tables.reopen(self.table)
        else:
            tables.clear(self.table, self.kind)
        mine = {"settings": self.identity, "fingerprint": self.fingerprint, "digest": self.digest}
        write_started(self.table, {**mine, "started_at": before.get("started_at", tables.now())})

    def commit(
        self, shards: Sequence[tables.Shard], began: float, *, figures: Mapping[str, Any] | None = None,
        metrics: Iterable[Metric] | None = None, provenance: Mapping[str, Any] | None = None, row_for_row: bool = True,
    ) -> tables.Record:  # fmt: skip
        """Write the record of the table, and the `metrics` first.

        Args:
            row_for_row: the table has a row for each that came in.
            provenance: beside the stamp.
        """
        rows, seconds = sum(shard.rows for shard in shards), time.monotonic() - began
        if row_for_row and rows != self.total:
            raise AssertionError(f"rows in = {self.total}, but {rows} written")
        if metrics is not None:
            write_metrics(self.output, self.name, metrics, self.stamp)
        return self.finish(
            self.table, self.kind, self.schema, shards, figures, provenance,
            seconds=round(seconds, 2), rows_per_s=round(self.total / max(seconds, 1e-9), 2),
        )  # fmt: skip

    def finish(
        self, folder: Folder, kind: str, schema: pa.Schema, shards: Sequence[tables.Shard],
        figures: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None, **clock: Any,
    ) -> tables.Record:  # fmt: skip
        """Write the record of one of the step's tables."""
        return tables.finish(
            folder, kind, schema, shards, fingerprint=self.fingerprint, settings=self.identity, figures=dict(figures or {}),
            inputs={"rows": self.total, "digest": self.digest, "input": self.inputs},
            provenance={**self.stamp, **(provenance or {})}, finished_at=tables.now(), **clock,
        )  # fmt: skip


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
    def made(self) -> dict[str, Any]:
        source = self.source
        return {"input": {"name": source.name, "digest": self.digest, **source.identity}, "space": source.space}

    @property
    def inputs(self) -> str:
        return self.source.name

    @property
    def schema(self) -> pa.Schema:
        """Identities, then the fixed columns."""
        return pa.schema([*self.source.id_fields, *tables.arrow_schema(self.kind)])


def open_fit(fit: str, suffix: str, output: Folder) -> tuple[Folder, tables.Record]:
    """What another step fitted, beside its table: the folder and its record. Raises SchemaError: it is not finished."""
    fitted = Folder(f"{absolute(fit) if '/' in fit else output.sub(fit).url}_{suffix}")
    return fitted, tables.finished(fitted, f"fit {fit}")


def refuse_other_fit(step: str, fit: str, width: int, space: Mapping[str, Any], source: VectorColumn) -> None:
    """Raises SchemaError where `fit` was made of vectors of another width or space than those of `source`."""
    if width != source.n_features:
        raise SchemaError(f"{step}: {fit} was fitted on vectors of {width}, {source.name} has {source.n_features}")
    if space and source.space and space != source.space:
        raise SchemaError(
            f"{step}: {fit} was fitted in another space than {source.name}: {'; '.join(changes(space, source.space))}"
        )
