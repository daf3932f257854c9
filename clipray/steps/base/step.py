"""What every step has in common: where it stands on disk, what a run gives it, how its tables are committed."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import pyarrow as pa

from clipray import tables
from clipray.engine.cluster import ClusterResources
from clipray.errors import ModelError, SchemaError, StaleTableError
from clipray.job import Job, Model, ModelStep, StepSettings
from clipray.job.load import changes, fingerprint, step_kind
from clipray.models.resolve import ResolvedModel
from clipray.storage.events import Events
from clipray.storage.folder import Folder
from clipray.tables.metrics import are_damaged
from clipray.tables.started import read_started

if TYPE_CHECKING:  # Polars, which workers over vectors do without
    from clipray.inputs.committed_rows import CommittedRows

AnySettings = TypeVar("AnySettings", bound=StepSettings)


@dataclass(frozen=True)
class State:
    """What is on disk: `finished`, `partial` (also: to be extended), `absent` or `stale`; `changed` says why stale.

    Attributes:
        again: rows that were rejected for a temporary reason and are tried again.
    """

    status: Literal["finished", "partial", "absent", "stale"]
    committed: CommittedRows | None = None
    changed: tuple[str, ...] = ()
    again: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Where a step stands, for a display.

    Attributes:
        total: rows that come in; written, rejected: of them, so far, earlier runs included.
        encoded: rows that went through a worker in this run (some of them not on disk yet).
        rate: rows a second over the last half minute; stages: rows a second and busy seconds by stage.
        queues: rows that wait for a stage: `decode`, `encode`, `write`.
    """

    step: str
    total: int
    written: int
    rejected: int
    encoded: int
    rate: float
    eta_s: float | None
    stages: dict[str, dict[str, float]]
    phase: str
    queues: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """What a step is opened with, beside its settings.

    Attributes:
        resolve: finds a model and its weights.
        retry: rows that were rejected for a temporary reason are tried again.
        cluster: connects to Ray at the first call; None where nothing is run.
        say: takes lines for a person.
    """

    job: Job
    output: Folder
    resolve: Callable[[Model], ResolvedModel]
    retry: bool = True
    cluster: Callable[[], ClusterResources] | None = None
    say: Callable[[str], None] = lambda _: None

    def model(self, settings: ModelStep) -> ResolvedModel:
        """The step's own model, else the job's. Raises ModelError: it encodes no texts, and the step needs them."""
        model = self.resolve(model_of(settings, self.job))
        if settings.needs_text and not model.has_text:
            raise ModelError(
                f"{settings.name}: {step_kind(settings)} encodes texts, and {model.name} is a vision model, "
                "without a text tower; name a model of images and texts, such as ViT-B-32, as the step's `model`"
            )
        return model

    def precision(self, settings: ModelStep) -> str:
        """Of the step's model."""
        return model_of(settings, self.job).precision

    def text_precision(self, settings: ModelStep) -> str:
        """Of the text tower: texts are few, and every row rests on them."""
        precision = self.precision(settings)
        return "fp32" if precision == "auto" else precision


def model_of(settings: ModelStep, job: Job) -> Model:
    """The step's own model, else the job's; a job without both is not valid."""
    model = settings.model or job.model
    assert model is not None
    return model


@dataclass(frozen=True)
class RunContext:
    """What a step gets from the run: a cluster when it asks for one, and who listens."""

    cluster: Callable[[], ClusterResources]
    events: Events
    watch: Callable[[Snapshot], None]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Step(ABC, Generic[AnySettings]):
    """A step whose inputs are opened and counted: to be looked at, or run.

    Attributes:
        replaces_stale: a table of other settings is made anew without being asked.
        output: the folder of the run, in which the step's tables lie.
    """

    replaces_stale: ClassVar[bool] = False

    settings: AnySettings
    output: Folder

    @property
    @abstractmethod
    def total(self) -> int:
        """Rows that come in."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of the rows that come in; when it changes, the table is made again, or extended."""

    @property
    def digest_as_stored(self) -> str:
        """The digest in the table's record where it stands for the rows that come in; else `digest`."""
        return self.digest

    def note_recount(self) -> None:
        """Note what an inspection has counted of the finished table, so that the next one need not count."""

    @property
    @abstractmethod
    def table_type(self) -> str:
        """One of `schemas/`."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """Of the table."""

    @property
    @abstractmethod
    def input_fingerprint(self) -> dict[str, Any]:
        """What decides the values of a row beside the settings: what made the inputs, by the settings that name them."""

    @property
    @abstractmethod
    def row_provenance(self) -> dict[str, Any]:
        """What made the rows, for the metadata of every shard."""

    @abstractmethod
    def describe(self, cluster: ClusterResources) -> list[str]:
        """Lines for `clipray plan`."""

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def table(self) -> Folder:
        return self.output.sub(self.settings.primary_table)

    @property
    def caveat(self) -> str:
        """What a person should know whatever the run does."""
        return ""

    @property
    def page(self) -> str:
        """Path or URL of the page that the step makes, if it makes one."""
        return ""

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the values of a row."""
        version = tables.table_schema(self.table_type)["version"]
        step = {"step": step_kind(self.settings), "schema_version": version}
        return {**step, **self.input_fingerprint, **self.settings.identity()}

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    def inspect(self, *, count: bool = True) -> State:  # noqa: ARG002 - of steps that go on in the middle of a table
        """Look at what is on disk without touching it; `count`: also how many rows of a partial table there are."""
        state = standing(self.table, self.identity, self.digest_as_stored)
        return State("partial") if state.status == "finished" and not self.is_complete() else state

    def is_complete(self) -> bool:
        """Whether all that belongs to the finished table is there: its companions, and its metrics."""
        companions = [self.output.sub(name) for name in self.settings.tables if name != self.settings.primary_table]
        return all(map(tables.whole_record, companions)) and not are_damaged(self.output, self.name)

    def commit(
        self, folder: Folder, table_type: str, schema: pa.Schema, shards: Sequence[tables.Shard], **facts: Any
    ) -> tables.Record:
        """Write the record of one of the step's tables: from here on it is finished. facts: more of its `Record`."""
        made_by: dict[str, Any] = {
            "fingerprint": self.fingerprint,
            "settings": self.identity,
            "finished_at": tables.now(),
        }
        return tables.commit(folder, table_type, schema, shards, **made_by, **facts)


def standing(table: Folder, identity: Mapping[str, Any], digest: str) -> State:
    """Compare a table on disk with the step as it is now. digest: of the rows that come in."""
    record = tables.record_to_go_on(table)
    before = record.settings if record else (read_started(table) or {}).get("settings")
    if before is None:
        return _standing_by_shards(table, fingerprint(identity))
    if fingerprint(before) != fingerprint(identity):
        return State("stale", changed=tuple(changes(before, identity)) or ("it was written by something else",))
    if record and record.inputs.get("digest") == digest and tables.intact(table, record):
        return State("finished")
    return State("partial")


def _standing_by_shards(table: Folder, wanted: str) -> State:
    """The same by its shards, where its record and its note are missing or damaged."""
    names = tables.shard_names(table)
    for name in names:
        with contextlib.suppress(SchemaError, FileNotFoundError):  # torn
            if tables.shard_footer(table, name)[2].get("fingerprint") != wanted:
                return State("stale", changed=("it was written by something else",))
    return State("partial" if names else "absent")


def refuse_stale(table: Folder, state: State) -> None:
    """Raises StaleTableError where the table was made with other settings."""
    if state.status == "stale":
        raise StaleTableError(
            f"{table.url} was made with other settings: {'; '.join(state.changed)}. "
            "Set them back, give the job another `output`, or make the table anew with `--fresh`"
        )
