"""What an encoder is told: made by the driver, read by workers. Imports no torch, so that the driver need not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from clipray.analysis.prompts import PromptStyle
from clipray.job import EmbedRegions, Feature, Lettering, RenderDepth
from clipray.models.resolve import ResolvedModel
from clipray.pipelines.limits import Limits


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs to know; small, so that it travels with every actor."""

    model: ResolvedModel
    limits: Limits
    features: dict[str, Feature]  # by column
    schema: pa.Schema  # of the table to write
    region_schema: pa.Schema | None = None  # of the regions table, where a feature has one
    keep_aspect: tuple[int, int] | None = None  # (long side, multiple of both sides) in px; None: the model's own crop
    precision: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    normalize: bool = True
    fast_decode: bool = False
    rounded_draft: bool = False  # JPEGs decoded smaller are scaled by their rounded sides, as in tables of before
    device: str = "cpu"
    threads: int = 1

    @property
    def at_once(self) -> int:
        """Batches in the network together: on a CPU each core has its own.

        Cores that share one wait for each other in every layer, the more so while pictures are decoded beside them.
        Positions of pictures of other sizes are put into the network itself, for one batch at a time.
        """
        return self.threads if self.device == "cpu" and self.keep_aspect is None else 1


@dataclass(frozen=True)
class ClassTexts:
    """Classes for one text tower.

    Attributes:
        ranges: of each style the first of its classes and the one behind the last.
    """

    model: ResolvedModel
    precision: str
    threads: int
    ranges: tuple[tuple[PromptStyle, int, int], ...]


@dataclass(frozen=True)
class TextSettings:
    """What a worker that encodes texts needs to know. at_once: batches in the network together."""

    at_once: ClassVar[int] = 1

    model: ResolvedModel
    schema: pa.Schema  # of the table to write
    precision: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    normalize: bool = True
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class PairSettings(TextSettings):
    """What a worker that scores captions needs to know.

    Attributes:
        prefix: what stands before every caption. pictures: the column with the pictures' vectors, and where they are from.
    """

    prefix: str = ""
    pictures: str = ""
    source: str = ""


@dataclass(frozen=True)
class AttackSettings(EncodeSettings):
    """What a worker that attacks pictures needs to know.

    Attributes:
        labels: names of the classes. classes: reads their vectors, in the worker.
        own: whether the word is the picture's own label.
        seed: of the words and of their places.
    """

    labels: tuple[str, ...] = ()
    classes: Callable[[], Any] = field(default=dict)
    lettering: Lettering = field(default_factory=Lettering)
    own: bool = False
    seed: int = 0


@dataclass(frozen=True)
class RegionSettings(EncodeSettings):
    """What a worker that encodes boxes of pictures needs to know. how: the prompt and its settings."""

    how: EmbedRegions = field(default_factory=lambda: EmbedRegions(name="regions", manifest=""))


@dataclass(frozen=True)
class CloudSettings(EncodeSettings):
    """What a worker that renders point clouds needs to know. how: the prompt, and how maps are drawn."""

    how: RenderDepth = field(default_factory=lambda: RenderDepth(name="clouds", manifest=""))
