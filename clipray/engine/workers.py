"""What Ray runs in workers. Only the workers import torch; the driver needs none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from clipray.engine.progress import Reporter
from clipray.pipelines.messages import fatal
from clipray.pipelines.spec import BlockFunction, ClassTexts, EncoderSpec, ImageSpec

if TYPE_CHECKING:
    from clipray.pipelines.class_texts import EncodedClasses


class Decode:
    """Blocks of manifest rows -> the same with `pixels`, in CPU tasks; see `BlockDecoder`."""

    def __init__(self, spec: ImageSpec, report: Reporter) -> None:
        self.spec, self.report = spec, report
        self._decode: BlockFunction | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"spec": self.spec, "report": self.report, "_decode": None}

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            if self._decode is None:
                from clipray.pipelines.image_loader import BlockDecoder

                self._decode = BlockDecoder(self.spec, self.report)
            return self._decode(block)


class Encode:
    """Blocks of manifest rows, or of pixels -> rows of the table, in an actor; see `BlockEncoder`."""

    def __init__(self, spec: EncoderSpec, report: Reporter) -> None:
        report({"starting": os.getpid()})
        self.report = report
        with fatal(report):
            self._encode = spec.build(report)

    def __call__(self, block: pa.Table) -> pa.Table:
        with fatal(self.report):
            return self._encode(block)


def encode_classes(work: ClassTexts) -> EncodedClasses:
    """A task; see `class_texts.encode_classes`."""
    from clipray.pipelines import class_texts

    return class_texts.encode_classes(work)
