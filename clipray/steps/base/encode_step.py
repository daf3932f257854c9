"""What the steps that encode the rows of a manifest have in common: where they stand, and how they are run."""

from __future__ import annotations

import contextlib
import functools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import pyarrow as pa

from clipray import tables
from clipray.errors import SchemaError
from clipray.inputs.committed_rows import CommittedRows, RegionFolders, check_committed
from clipray.inputs.content_versions import CONTENT_HASH
from clipray.inputs.manifest import Manifest
from clipray.inputs.row_index import RowIndex
from clipray.inputs.vector_lookup import Lookup
from clipray.job import Encoding
from clipray.job.load import fingerprint, step_kind
from clipray.models.resolve import ResolvedModel, provenance
from clipray.pipelines.spec import EncodeSettings, TextSettings
from clipray.steps.base.comparison import Comparison
from clipray.steps.base.step import RunContext, State, standing
from clipray.storage.folder import Folder
from clipray.tables.metrics import are_damaged
from clipray.tables.reasons import passing
from clipray.tables.started import read_started

AnyEncoding = TypeVar("AnyEncoding", bound=Encoding)


@dataclass(frozen=True)
class EncodeStep(ABC, Generic[AnyEncoding]):
    """A `Step`, ready to be looked at or run: its inputs are opened and counted, its model is found.

    Attributes:
        keep: columns of the manifest in the table: those that the job names, and those that the step itself needs.
        retry: rows that are rejected for a passing reason are tried again, at the end of a run and in the next one.
    """

    settings: AnyEncoding
    output: Folder
    manifest: Manifest
    scan: RowIndex
    model: ResolvedModel
    precision: str
    keep: tuple[str, ...]
    retry: bool = field(default=True, kw_only=True)

    @property
    @abstractmethod
    def widths(self) -> dict[str, int]:
        """Width of each vector column. Raises ModelError: the network has no such layer."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Of the table."""

    @property
    @abstractmethod
    def made(self) -> dict[str, Any]:
        """What beside the model made the rows, for the metadata of every shard."""

    @abstractmethod
    def encoder(self, precision: str, device: str, threads: int) -> EncodeSettings | TextSettings:
        """What each encoder must know of the step."""

    @property
    def input_fingerprint(self) -> str:
        """Digest of other inputs than the manifest; when it changes, every row is made again."""
        return ""

    @property
    def digest(self) -> str:
        """Of all rows that come in, and of what else they rest on."""
        return f"{self.scan.digest}-{self.input_fingerprint}" if self.input_fingerprint else self.scan.digest

    def lookup(self) -> tuple[Lookup, str] | None:
        """Vectors that rows get on their way, and the rows' column with their ids. Raises SchemaError."""
        return None

    def figures(self, _stock: CommittedRows, _made: dict[str, Any]) -> dict[str, Any]:
        """What the finished table is summed up in, for its record; written into `metrics` too."""
        return {}

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def total(self) -> int:
        return self.scan.rows

    @property
    def table(self) -> Folder:
        return self.output.sub(self.settings.name)

    @property
    def rejects(self) -> Folder:
        return self.output.sub(f"rejects/{self.settings.name}")

    @property
    def rejects_schema(self) -> pa.Schema:
        return tables.rejects_schema(*self.manifest.kind.named, *(field.name for field in self.hash_fields))

    @property
    def hash_fields(self) -> list[pa.Field]:
        """The column of contents' hashes, where the table has it."""
        return [pa.field(CONTENT_HASH, pa.string())] if self.comparison.contents else []

    @functools.cached_property
    def _before(self) -> dict[str, Any] | None:
        """What the table that is there was made from: finished, or begun."""
        record = tables.record_to_go_on(self.table)
        if record:
            scaling = record.provenance.get("draft_scaling")
            return {**record.inputs, "content_hash": CONTENT_HASH in record.columns, "draft_scaling": scaling}
        return read_started(self.table) or told_by_shards(self.table) or None

    @functools.cached_property
    def comparison(self) -> Comparison:
        """Of the rows' contents with those that the table was made from."""
        named = frozenset((*self.keep, *getattr(self.settings, "features", ())))
        return Comparison(self.manifest, self.scan, self._before, named, self.settings.checked_schemes)

    @property
    def caveat(self) -> str:
        """What a person should know whatever the run does."""
        return self.comparison.caveat

    @property
    def regions(self) -> RegionFolders | None:
        """Where the regions go, if the step writes any."""
        return None

    @property
    def region_schema(self) -> pa.Schema | None:
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the values of a row."""
        return {
            "step": step_kind(self.settings),
            "schema_version": tables.table_schema(self.manifest.kind.table)["version"],
            "model": {**self.model.identity(), "precision": self.precision},
            **self.settings.identity(),
            "keep": list(self.keep),
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def provenance(self, precision: str) -> dict[str, Any]:
        """What made the rows, for the metadata of every shard."""
        from clipray import __version__  # which this module's importers make

        found = provenance(self.model)
        return {
            "fingerprint": self.fingerprint,
            "name": self.name,
            "model": {**found["model"], "precision": precision},
            **self.made,
            "versions": {"clipray": __version__, **found["versions"]},
        }

    def inspect(self, *, count: bool = True) -> State:
        state = self._standing()
        if state.kind != "partial" or not count:
            return state
        scan = self.comparison.scan_with_contents()
        stock = check_committed(
            self.table, self.rejects, scan, self.keep, self.fingerprint, regions=self.regions, repair=False
        )
        return State("partial", stock, again=passing(stock.rejects) if self.retry else 0)

    def _standing(self) -> State:
        state = standing(self.table, self.identity, self.digest)
        finished = state.kind == "finished"
        undone = finished and (self.comparison.changed or self._broken_beside() or self.to_try_again)
        return State("partial") if undone else state

    def _broken_beside(self) -> bool:
        """Whether what the step wrote beside its table is damaged."""
        beside = (self.rejects, self.regions.rejects) if self.regions else (self.rejects,)
        return any(map(tables.is_broken, beside)) or are_damaged(self.output, self.name)

    @property
    def to_try_again(self) -> bool:
        """Whether the finished table has rejects that the next run tries again."""
        record = tables.record_to_go_on(self.table)
        return self.retry and record is not None and passing(record.rejects_by_reason) > 0

    def describe(self, cluster: Any) -> list[str]:
        from clipray.engine.plan import make_plan

        manifest, model = self.manifest, self.model
        vectors = ", ".join(f"{width} ({name})" for name, width in self.widths.items())
        return [
            f"{self.name}: manifest of {len(manifest.urls)} file(s), {self.scan.rows} rows, {manifest.bytes / 2**20:.1f} MiB, {self.scan.rejects.num_rows} refused",
            f"{self.name}: {make_plan(self.settings, cluster).sentence()}",
            f"{self.name}: model {model.name}, weights {model.weights[:23]}{f', vectors of {vectors}' if vectors else ''}",
            *([f"{self.name}: {self.caveat}"] if self.caveat else []),
        ]

    def run(self, run: RunContext) -> tables.Record:
        _ = self.widths  # an unknown layer is told before any work
        from clipray.engine.plan import make_plan
        from clipray.engine.progress import Progress
        from clipray.steps.base.encode_run import EncodeRun

        refused = self.scan.rejects
        if refused.num_rows:
            run.say(
                f"{self.name}: {refused.num_rows} of {self.total} manifest rows have no id, a repeated one or a string that is not UTF-8 and are rejected, e.g. {refused['message'][0].as_py()}"
            )
        cluster = run.cluster()
        plan = make_plan(self.settings, cluster)
        run.say(f"{self.name}: {plan.sentence()}")
        run.events.write(
            "step_started", step=self.name, rows=self.total, plan=plan.sentence(), fingerprint=self.fingerprint
        )
        return EncodeRun(self, plan, Progress(), run.events, run.watch).run()


def told_by_shards(table: Folder) -> dict[str, Any]:
    """What the note of a table that was begun should say, where it is missing or damaged; empty where there are no shards."""
    facts: dict[str, Any] = {}
    for name in tables.shard_names(table):
        number = re.match(r"part-(\d+)-", name)
        facts["attempt"] = max(facts.get("attempt", 0), int(number[1]) if number else 0)
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn
            _, schema, stamp = tables.shard_stamp(table, name)
            facts.setdefault("precision", stamp.get("model", {}).get("precision"))
            facts.setdefault("content_hash", CONTENT_HASH in schema.names)
            facts.setdefault("draft_scaling", stamp.get("draft_scaling"))
    return facts
