"""What a worker is told: built by the driver, read by workers. Imports no torch, so that the driver needs none."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from clipray.analysis.prompts import PromptStyle
from clipray.job import USER_AGENT, EmbedRegions, Feature, FileEncoding, Lettering, RenderDepth
from clipray.models.geometry import Geometry, geometry
from clipray.models.preprocess import MAX_PIXELS
from clipray.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from clipray.analysis.zero_shot import ZeroShot

BlockFunction = Callable[[pa.Table], pa.Table]
Report = Callable[[dict[str, Any]], None]
"""Takes `{stage, rows, seconds}`, `{worker: facts}` or `{fatal: text}`; never waits."""


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes:
        fetch_timeout_s: how long one request may take, its answer included.
        patience: a row may take `patience * fetch_timeout_s`, including repeated requests and the waits between them.
        disallowed_header_directives: of `X-Robots-Tag`, each of which rejects a file.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = MAX_PIXELS
    fetch_timeout_s: float = 30.0
    schemes: tuple[str, ...] = ("file",)
    patience: int = 1
    user_agent: str = USER_AGENT
    connections_per_host: int = 16
    disallowed_header_directives: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: FileEncoding, max_pixels: int = 0) -> Limits:
        """Those of a step."""
        return cls(
            max_bytes=settings.max_bytes,
            max_pixels=max_pixels,
            fetch_timeout_s=settings.fetch_timeout_s,
            schemes=settings.schemes,
            user_agent=settings.user_agent,
            connections_per_host=settings.connections_per_host,
            disallowed_header_directives=settings.disallowed_header_directives,
        )


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What every worker that encodes needs to know; small, because it travels with every actor.

    Attributes:
        block_encoder: `module:class`; a name, because its module imports torch, and this one.
    """

    block_encoder: ClassVar[str]

    model: ResolvedModel
    schema: pa.Schema  # of the table to write
    region_schema: pa.Schema | None = None  # of the regions table, where there is one
    precision: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    normalize: bool = True
    device: str = "cpu"
    threads: int = 1

    @property
    def at_once(self) -> int:
        """Batches in the network at the same time."""
        return 1

    def build(self, report: Report) -> BlockFunction:
        """Load the network; for a worker."""
        block_encoder: Callable[[EncoderSpec, Report], BlockFunction] = pkgutil.resolve_name(self.block_encoder)
        return block_encoder(self, report)


@dataclass(frozen=True, kw_only=True)
class ImageSpec(EncoderSpec):
    """Images to vectors."""

    block_encoder = "clipray.pipelines.image:ImageBlockEncoder"

    limits: Limits
    features: dict[str, Feature] = field(default_factory=dict)  # by column; none: the CLIP vector
    keep_aspect: tuple[int, int] | None = None  # (long side, multiple of both sides) in px; None: the model's own crop
    fast_decode: bool = False
    rounded_draft: bool = False  # scale a JPEG that is decoded smaller by its rounded sides, as older tables do

    def geometry(self, height: int, width: int) -> Geometry:
        """How an image of this size, in px, becomes the network's input."""
        return geometry(height, width, self.model.preprocess, self.keep_aspect)

    @property
    def at_once(self) -> int:
        """Batches in the network at the same time: on a CPU, one for each core.

        Cores that share a batch wait for each other in every layer, and more so while images are decoded beside them.
        Images of other sizes change the network's positional embedding, so only one batch of them runs at a time.
        """
        return self.threads if self.device == "cpu" and self.keep_aspect is None else 1


@dataclass(frozen=True, kw_only=True)
class RegionSpec(ImageSpec):
    """Boxes of images to vectors. how: the prompt and its settings."""

    block_encoder = "clipray.pipelines.region:RegionBlockEncoder"

    how: EmbedRegions


@dataclass(frozen=True, kw_only=True)
class AttackSpec(ImageSpec):
    """Labelled images to labels before and after a typographic attack.

    Attributes:
        labels: names of the classes. classifier: makes what tells them from vectors, in the worker.
        own_label: whether the word is the image's own label.
        seed: of the words and of their places.
    """

    block_encoder = "clipray.pipelines.attack:AttackBlockEncoder"

    labels: tuple[str, ...]
    classifier: Callable[[], ZeroShot]
    lettering: Lettering
    own_label: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class CloudSpec(ImageSpec):
    """Point clouds to vectors. how: the prompt, and how maps are drawn."""

    block_encoder = "clipray.pipelines.point_cloud:CloudBlockEncoder"

    how: RenderDepth


@dataclass(frozen=True, kw_only=True)
class TextSpec(EncoderSpec):
    """Texts to vectors."""

    block_encoder = "clipray.pipelines.text:TextBlockEncoder"


@dataclass(frozen=True, kw_only=True)
class CaptionSpec(EncoderSpec):
    """Captions and image vectors to scores.

    Attributes:
        prefix: what stands before every caption.
        image_vectors: the block's column with the image vectors. source: the table that they come from.
    """

    block_encoder = "clipray.pipelines.caption:CaptionBlockEncoder"

    prefix: str
    image_vectors: str
    source: str


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
class EncodedClasses:
    """For each range the class vectors (k, d) float32 and the numbers of texts (k,) int64; and facts about the tower."""

    parts: list[tuple[np.ndarray, np.ndarray]]
    facts: dict[str, Any]
