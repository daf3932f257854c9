"""Steps that encode the rows of a manifest: what they make, and how much of it is on disk."""

from __future__ import annotations

import contextlib
import functools
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import pyarrow as pa

from clipray import __version__, tables
from clipray.engine.cluster import ClusterResources
from clipray.engine.plan import make_plan
from clipray.errors import SchemaError
from clipray.inputs.committed_rows import CommittedRows, RegionFolders, check_committed, regions_of_another
from clipray.inputs.content_versions import CONTENT_HASH
from clipray.inputs.key_index import is_of_another_hash
from clipray.inputs.manifest import Manifest
from clipray.inputs.row_index import RowIndex, scan
from clipray.inputs.vector_lookup import Lookup
from clipray.job import Encoding
from clipray.job.load import fingerprint
from clipray.models.resolve import ResolvedModel, provenance
from clipray.pipelines.spec import EncoderSpec
from clipray.steps.base.comparison import Comparison
from clipray.steps.base.step import RunContext, State, Step, StepContext
from clipray.storage.folder import Folder
from clipray.tables.reasons import passing
from clipray.tables.started import read_started, write_started

AnyEncoding = TypeVar("AnyEncoding", bound=Encoding)
RECOUNTED = "recounted"  # in a table's note: the digest in its record, and what stands for it now


@dataclass(frozen=True)
class EncodeStep(Step[AnyEncoding]):
    """A `Step` whose rows are those of a manifest, and whose model is resolved.

    Attributes:
        keep: columns of the manifest in the table: those that the job names, and those that the step itself needs.
        retry: rows that are rejected for a temporary reason are tried again, at the end of a run and in the next one.
    """

    manifest: Manifest
    scan: RowIndex
    model: ResolvedModel
    precision: str
    keep: tuple[str, ...]
    retry: bool = field(default=True, kw_only=True)

    @classmethod
    def of(
        cls, settings: AnyEncoding, context: StepContext, manifest: Manifest, keep: Sequence[str], **more: Any
    ) -> Self:
        """Count the rows of the manifest, and resolve the model. more: the fields that the step adds."""
        keep, retry = tuple(keep), context.retry
        rows, model, precision = scan(manifest, keep), context.model(settings), context.precision(settings)
        return cls(settings, context.output, manifest, rows, model, precision, keep, retry=retry, **more)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each vector column. Raises ModelError: the network cannot make such vectors."""
        return {}

    @property
    def schema(self) -> pa.Schema:
        element = getattr(self.settings, "vector_type", "float32")  # of steps that write vectors
        return tables.arrow_schema(self.table_type, self.widths, element=element, extra=self.extra_fields)

    @property
    def extra_fields(self) -> list[pa.Field]:
        """Columns behind the vectors."""
        return [*self.hash_fields, *self.kept_fields]

    @abstractmethod
    def encoder(self) -> EncoderSpec:
        """What each encoder must know of the step; the run adds how and where it encodes."""

    def before_encoding(self, run: RunContext) -> None:
        """Make what the encoders read, such as vectors of classes."""

    @property
    def lookup_digest(self) -> str:
        """Of what `lookup` reads; when it changes, every row is made again."""
        return ""

    def lookup(self) -> tuple[Lookup, str] | None:
        """Vectors that rows get on their way, and the rows' column with their ids. Raises SchemaError."""
        return None

    def summarize(self, _committed: CommittedRows, _provenance: dict[str, Any]) -> dict[str, Any]:
        """The summary of the finished table, for its record; written to `metrics`, too."""
        return {}

    @property
    def table_type(self) -> str:
        return self.manifest.spec.table

    @property
    def total(self) -> int:
        return self.scan.rows

    @property
    def digest(self) -> str:
        return f"{self.scan.digest}-{self.lookup_digest}" if self.lookup_digest else self.scan.digest

    @property
    def digest_as_stored(self) -> str:
        """Counts the rows of a table whose digest is of another hash than today's, unless that is noted."""
        record = tables.record_to_go_on(self.table)
        if record is None or fingerprint(record.settings) != self.fingerprint:
            return self.digest
        stored, now = str(record.inputs.get("digest")), inputs_now(self.table, record).get("digest")
        same = self._is_all_there(stored) if is_of_another_hash(now) else now == self.digest
        return stored if same else self.digest

    def _is_all_there(self, stored: str) -> bool:
        """Whether the table holds the rows of now, and none besides: reads its ids, and what its rows were made from."""
        if stored.partition("-")[2] != self.lookup_digest:
            return False
        committed = self.check_committed()
        counted = committed.rows + committed.rejected
        return bool(committed.done.all()) and not committed.repaired and counted == self.total

    def check_committed(
        self, rows: RowIndex | None = None, verified: dict[str, tables.Shard] | None = None
    ) -> CommittedRows:
        """Count what is on disk; with `verified` also repair it, see `check_committed`.

        rows: of the manifest; by default with their contents.
        """
        return check_committed(
            self.table, self.rejects, rows or self.comparison.scan_with_contents(), self.keep, self.fingerprint,
            regions=self.regions, repair=verified is not None, verified=verified,
        )  # fmt: skip

    def note_recount(self) -> None:
        record, note = tables.read_record(self.table), read_started(self.table)
        if record and note and is_of_another_hash(inputs_now(self.table, record).get("digest")):
            looked = {"sources_digest": self.comparison.digest} if self.comparison.digest else {}
            recounted = {"of": record.inputs["digest"], "inputs": {"digest": self.digest, **looked}}
            write_started(self.table, {**note, RECOUNTED: recounted})

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {"model": {**self.model.identity(), "precision": self.precision}}

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "keep": list(self.keep)}

    @property
    def rejects(self) -> Folder:
        return tables.rejects_of(self.output, self.settings.primary_table)

    @property
    def rejects_schema(self) -> pa.Schema:
        return tables.rejects_schema(*self.manifest.spec.named, *(field.name for field in self.hash_fields))

    @property
    def hash_fields(self) -> list[pa.Field]:
        """The column of contents' hashes, where the table has it."""
        return [pa.field(CONTENT_HASH, pa.string())] if self.comparison.contents else []

    @property
    def kept_fields(self) -> list[pa.Field]:
        return [self.manifest.schema.field(name).with_nullable(True) for name in self.keep]

    @functools.cached_property
    def before(self) -> dict[str, Any] | None:
        """What the table that is there was made from: finished, or begun."""
        record = tables.record_to_go_on(self.table)
        if record:
            scaling = record.provenance.get("draft_scaling")
            return {
                **inputs_now(self.table, record),
                "content_hash": CONTENT_HASH in record.columns,
                "draft_scaling": scaling,
            }
        return read_started(self.table) or told_by_shards(self.table) or None

    @functools.cached_property
    def comparison(self) -> Comparison:
        """Of the manifest's rows with those that the table was made from."""
        named = frozenset((*self.keep, *getattr(self.settings, "features", ())))
        return Comparison(self.manifest, self.scan, self.before, named, self.settings.checked_schemes)

    @property
    def caveat(self) -> str:
        return self.comparison.caveat

    @property
    def regions(self) -> RegionFolders | None:
        """Where the regions go, if the step writes any."""
        return None

    @property
    def region_schema(self) -> pa.Schema | None:
        return None

    def shard_metadata(self, precision: str) -> dict[str, Any]:
        """What made the rows, for the metadata of every shard."""
        of_model = provenance(self.model)
        return {
            "fingerprint": self.fingerprint,
            "name": self.name,
            "model": {**of_model["model"], "precision": precision},
            **self.row_provenance,
            "versions": {"clipray": __version__, **of_model["versions"]},
        }

    def inspect(self, *, count: bool = True) -> State:
        state = super().inspect()
        if self.regions and state.status in ("absent", "partial"):
            other = regions_of_another(self.regions, self.fingerprint, self.name)
            if other:
                setting = "name" if self.regions.table.url == self.output.sub(self.name).url else "regions_name"
                return State("stale", changed=(f"{other} is of another step, choose another `{setting}`",))
        if state.status != "partial" or not count:
            return state
        committed = self.check_committed()
        return State("partial", committed, again=passing(committed.rejects) if self.retry else 0)

    def is_complete(self) -> bool:
        rejects = [self.rejects, *([self.regions.rejects] if self.regions else [])]
        undone = self.comparison.changed or self.to_try_again or any(map(tables.is_broken, rejects))
        return not undone and super().is_complete() and self._has_its_own_regions()

    def _has_its_own_regions(self) -> bool:
        record = tables.record_to_go_on(self.regions.table) if self.regions else None
        return self.regions is None or (record is not None and record.fingerprint == self.fingerprint)

    @property
    def to_try_again(self) -> bool:
        """Whether the finished table has rejects that the next run tries again."""
        record = tables.record_to_go_on(self.table)
        return self.retry and record is not None and passing(record.rejects_by_reason) > 0

    def describe(self, cluster: ClusterResources) -> list[str]:
        manifest, model = self.manifest, self.model
        vectors = ", ".join(f"{width} ({name})" for name, width in self.widths.items())
        return [
            f"{self.name}: manifest of {len(manifest.urls)} file(s), {self.scan.rows} rows, {manifest.bytes / 2**20:.1f} MiB, {self.scan.rejects.num_rows} refused",
            f"{self.name}: {make_plan(self.settings, cluster).sentence()}",
            f"{self.name}: model {model.name}, weights {model.weights[:23]}{f', vectors of {vectors}' if vectors else ''}",
            *([f"{self.name}: {self.caveat}"] if self.caveat else []),
        ]


def inputs_now(table: Folder, record: tables.Record) -> dict[str, Any]:
    """The inputs of a record, with the digests of today's hash where a recount has noted them.

    The record itself keeps its digests, so that what was made from the table stays finished.
    """
    note = (read_started(table) or {}).get(RECOUNTED, {})
    return {**record.inputs, **note["inputs"]} if note.get("of") == record.inputs.get("digest") else record.inputs


def told_by_shards(table: Folder) -> dict[str, Any]:
    """What the table's shards tell in place of a note that is missing or damaged; empty where there are no shards."""
    facts: dict[str, Any] = {}
    for name in tables.shard_names(table):
        number = re.match(r"part-(\d+)-", name)
        facts["attempt"] = max(facts.get("attempt", 0), int(number[1]) if number else 0)
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn
            _, schema, metadata = tables.shard_footer(table, name)
            facts.setdefault("precision", metadata.get("model", {}).get("precision"))
            facts.setdefault("content_hash", CONTENT_HASH in schema.names)
            facts.setdefault("draft_scaling", metadata.get("draft_scaling"))
    return facts
