"""The base of all settings: frozen, typed and validated once, when the job is loaded.

A field marked `Execution` changes how fast or how patiently a step runs, never which values it writes for a row,
so it is no part of a table's fingerprint. Nor is one that names an input: there stands what made that. It is marked
`TableInput` or `ColumnInput` where it names a table that an earlier step may write, or a column of one, else `Reference`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Execution, Reference, TableInput, ColumnInput = "execution", "reference", "table", "column"
MARKERS = (Execution, Reference, TableInput, ColumnInput)
"""Markers in a field's `Annotated` metadata; see the module's docstring."""

TABLE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"
Count = Annotated[int, Field(ge=1, strict=True)]
Actors = Literal["auto"] | Count | tuple[Count, Count]
Decoding = Literal["auto", "tasks", "actors", "none"]
LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
SELECTOR = re.compile(rf"!?{LABEL}|!?in\({LABEL}(?:, ?{LABEL})*\)")


def added_later(default: Any, **field: Any) -> Any:
    """A field that came after tables had been written: where it has its default it is no part of the fingerprint.

    So tables of before stay finished. field: more arguments of pydantic's `Field`.
    """
    return Field(default, exclude_if=lambda value: value == default, **field)


def _label_selector(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(rf"(?:[A-Za-z0-9.-]+/)?{LABEL}", key):
            raise ValueError(f"{key!r} is no label of a node; expected a key such as ray.io/node-group")
        if not SELECTOR.fullmatch(value):
            raise ValueError(f"{key}: expected `value`, `!value`, `in(a, b)` or `!in(a, b)`, found {value!r}")
    return labels


def _without_true(value: Any) -> Any:
    return None if value is True or value == "true" else value


Pretrained = Annotated[
    str | None,
    BeforeValidator(_without_true, json_schema_input_type=bool | str | None),
]
"""`true` names no other weights than the model's own."""
LabelSelector = Annotated[dict[str, str], AfterValidator(_label_selector)]
"""Labels that a node must have, as Ray writes them."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, hide_input_in_errors=True)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is written, as plain JSON values.

        All but marked fields, and but those `added_later` that have their default.
        """
        fields = type(self).model_fields.items()
        skip = {name for name, field in fields if any(marker in field.metadata for marker in MARKERS)}
        return self.model_dump(mode="json", exclude=skip)

    @property
    def sources(self) -> tuple[str, ...]:
        """The tables that it reads, as the job names them: `images`, or `runs/other/images` of another run."""
        return tuple(dict.fromkeys(self._inputs()))

    def _inputs(self) -> Iterator[str]:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, str) and TableInput in field.metadata:
                yield value
            elif isinstance(value, str) and ColumnInput in field.metadata:
                yield value.rpartition(".")[0]

    def refuse_without(self, name: str, other: str, value: str) -> None:
        """Raises ValueError where the setting `name` is set, which goes with one value of the setting `other` only."""
        actual = getattr(self, other)
        if name in self.model_fields_set and actual != value:
            raise ValueError(f"`{name}` goes with `{other}: {value}`, found `{other}: {actual}`")


class Model(Settings):
    """A network, and its weights.

    Attributes:
        name: an open_clip name (`ViT-B-32`), the path of an open_clip config (`*.json`), a name of timm's
            (`timm/vit_small_patch14_dinov2`), a model of transformers (`hf:org/model`, `hf:/path`), `hf-hub:org/model`
            or `local-dir:/path` of open_clip or timm, or the built-in `demo` (a ViT) or `demo-rn` (a ResNet).
        pretrained: a tag of that name, the path or URL of a checkpoint, or `random`; `true` for the weights that the
            name itself brings.
        seed: the seed of the random weights, with `pretrained: random` only.
        precision: `auto` is bf16 where the hardware multiplies it natively, else fp32.
    """

    name: str
    pretrained: Pretrained = None
    seed: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"

    @model_validator(mode="after")
    def _random_needs_a_seed(self) -> Model:
        if self.pretrained == "random" and self.seed is None:
            raise ValueError("`pretrained: random` needs a `seed`, so that every worker draws the same weights")
        if self.pretrained != "random" and self.seed is not None:
            raise ValueError("`seed` goes with `pretrained: random` only")
        return self


class StepSettings(Settings):
    """Settings of one step of a job. A setting that several steps share means the same in each of them.

    Attributes:
        name: the name of the step and of the table that it writes.
        input: a vector column: `table.column` of this run, `FOLDER/table.column` of another run, or any Parquet.
        vector_type: `float16` halves the table.
        random_state: the seed of random draws.
        max_iterations: the maximum number of iterations.
        top: how many results to keep for each row.
        rows_per_file: the approximate maximum of rows in a shard.
    """

    needs_cluster: ClassVar[bool] = True
    uses_torch: ClassVar[bool] = False
    """Whether its workers import torch though they load no model."""
    companion: ClassVar[str] = ""
    """Of a step that writes two tables: the second is called `NAME_companion`."""

    name: str = Field(pattern=TABLE_NAME)

    def identity(self) -> dict[str, Any]:
        return {key: value for key, value in super().identity().items() if key != "name"}

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the step writes, its own first."""
        return (self.name, f"{self.name}_{self.companion}") if self.companion else (self.name,)

    @property
    def primary_table(self) -> str:
        """The table by whose rows and rejects the step counts what comes in; its own, but for steps that write several rows for one."""
        return self.name

    @property
    def reads_run(self) -> bool:
        """Whether it may read any table of the run, beside its `sources`."""
        return False

    @property
    def needs_architecture(self) -> bool:
        """Whether the driver must know the network's layers, and not only what it returns."""
        return False


class MadeId(Settings):
    """An id that is made.

    Attributes:
        source: `row`: of the file's name and the row's number in it; `content`: the SHA-256 of the row's bytes.
    """

    source: Literal["row", "content"] = Field(alias="from")


def _extension(name: str) -> str:
    name = name.removeprefix(".").lower()
    if not name or "/" in name:
        raise ValueError("expected what follows the first dot in a file's name, such as txt or seg.png")
    return name


Extension = Annotated[str, AfterValidator(_extension)]
TAR_COLUMNS = ("image_id", "uri", "offset", "size", "version")


class ManifestColumns(Settings):
    """Parquet whose columns have names of their own, or tars as WebDataset has them.

    All other keys are names of a manifest's columns, or of those in `keep`: their values are names in the files, nested
    by dots (`image.bytes`). An id may also be made: `image_id: {from: row}`.

    Attributes:
        path: Parquet: a file, a glob, a folder, or a list of these.
        tars: in place of `path`: a tar, a glob, braces such as `{00000..00099}.tar`, a folder, or a list of these.
        texts: of tars: the extensions of files in them that become columns of strings, such as txt and json.
        image: of tars: the extension of the images, where samples have several.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | MadeId] = Field(init=False)

    path: str | list[str] | None = None
    tars: str | list[str] | None = None
    texts: list[Extension] = Field(default_factory=list, alias="columns")
    image: Extension | None = None

    @model_validator(mode="after")
    def _parquet_or_tars(self) -> Self:
        if (self.path is None) == (self.tars is None):
            raise ValueError("expected `path`, of Parquet, or `tars`")
        if self.tars is None and (self.texts or self.image):
            raise ValueError(f"`{'columns' if self.texts else 'image'}` goes with `tars`")
        refuse_taken(self.texts, TAR_COLUMNS, "drop it from `columns`")
        return self

    @property
    def paths(self) -> list[str]:
        """Files, globs and folders of Parquet or of tars."""
        paths = self.path or self.tars or []
        return [paths] if isinstance(paths, str) else paths

    @property
    def columns(self) -> dict[str, str]:
        """Name in the manifest -> name in the files."""
        return {name: column for name, column in self.__pydantic_extra__.items() if isinstance(column, str)}

    @property
    def made_ids(self) -> dict[str, Literal["row", "content"]]:
        """Name of each id that is made -> what it is made from."""
        return {name: how.source for name, how in self.__pydantic_extra__.items() if isinstance(how, MadeId)}


class ModelStep(StepSettings):
    """Settings of all steps that run a network.

    Attributes:
        model: the step's own model; by default the job's.
    """

    needs_text: ClassVar[bool] = False
    """Whether it encodes texts, for which a vision model has no tower."""

    model: Annotated[Model | None, Reference] = None


class Encoding(ModelStep):
    """Settings of all steps that encode the rows of a manifest.

    Attributes:
        manifest: Parquet with a row for each input: a file, a glob, a folder, or a list of these; or a mapping with its
            `path` and the names of its columns, or with `tars`.
        keep: columns of the manifest to carry through.
        max_reject_rate: above this share of rejected rows the job fails; everything written is kept.
        actors: the number of encoders, `[min, max]`, or `auto`: one per GPU, or one per 8 CPUs.
        gpus_per_actor: `auto` is 1 where there are GPUs, else 0; fractions are allowed.
        cpus_per_actor: the CPUs that each encoder requests from Ray; `auto` leaves room to read and decode.
        device: `auto` is CUDA where an encoder has a GPU; `cpu` leaves that GPU idle.
        encode_on: labels of the nodes for encoders, as Ray selects them.
        batch_size: `auto` is the fastest of a few sizes, measured when the encoder starts.
        rows_per_block: the rows that pass through an encoder together.
        flush_s: finished rows are written at least this often, in seconds.
    """

    fixed_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of its table, and those that rows carry on their way to it."""

    manifest: Annotated[str | list[str] | ManifestColumns, Reference]
    keep: list[str] = Field(default_factory=list)
    max_reject_rate: Annotated[float, Execution, Field(ge=0, le=1)] = 0.01
    # How it runs.
    actors: Annotated[Actors, Execution] = "auto"
    gpus_per_actor: Annotated[Literal["auto"] | Annotated[float, Field(ge=0)], Execution] = "auto"
    cpus_per_actor: Annotated[Literal["auto"] | Annotated[float, Field(gt=0)], Execution] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Execution] = "auto"
    encode_on: Annotated[LabelSelector, Execution] = Field(default_factory=dict)
    batch_size: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], Execution] = "auto"
    rows_per_block: Annotated[int, Execution, Field(ge=1)] = 128
    rows_per_file: Annotated[int, Execution, Field(ge=1)] = 16_384
    flush_s: Annotated[float, Execution, Field(ge=0)] = 20.0

    @field_validator("actors")
    @classmethod
    def _min_before_max(cls, actors: Any) -> Any:
        if isinstance(actors, tuple) and actors[0] > actors[1]:
            raise ValueError(f"[min, max] with min={actors[0]} > max={actors[1]}")
        return actors

    @model_validator(mode="after")
    def _column_names_are_free(self) -> Self:
        refuse_taken(self.keep, self.fixed_columns, "drop it from `keep`")
        return self

    @property
    def manifest_paths(self) -> list[str]:
        """Files, globs and folders of the manifest."""
        if isinstance(self.manifest, ManifestColumns):
            return self.manifest.paths
        return [self.manifest] if isinstance(self.manifest, str) else self.manifest

    @property
    def decoding(self) -> Decoding:
        """Where rows are made ready for the encoders."""
        return "none"

    @property
    def checked_schemes(self) -> tuple[str, ...]:
        """Schemes of URIs whose files are looked at, to notice those that have changed."""
        return ()

    @property
    def decoding_on(self) -> dict[str, str]:
        """Labels of the nodes on which they are, where that is in tasks."""
        return {}


class Embedding(Encoding):
    """Settings of all steps that write vectors.

    Attributes:
        normalize: `none` keeps vectors as the network returns them.
    """

    normalize: Literal["l2", "none"] = "l2"
    vector_type: Literal["float32", "float16"] = "float32"


def refuse_taken(named: list[str], fixed: tuple[str, ...], what: str) -> None:
    """Raises ValueError where two columns of a table would have one name."""
    taken = [name for name in named if name in fixed or named.count(name) > 1]
    if taken:
        raise ValueError(f"the column name {taken[0]!r} is taken: {what}")
