"""What Ray runs in workers. Only there is torch imported: the driver hands these over without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from clipray.engine.progress import Reporter
from clipray.pipelines.messages import fatal
from clipray.pipelines.spec import (
    AttackSettings,
    ClassTexts,
    CloudSettings,
    EncodeSettings,
    PairSettings,
    RegionSettings,
    TextSettings,
)


class Decode:
    """Blocks of manifest rows -> the same with `pixels`, in CPU tasks; see `DecodeBlocks`."""

    def __init__(self, settings: EncodeSettings, report: Reporter) -> None:
        self.settings, self.report = settings, report
        self._work: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "report": self.report, "_work": None}

    def __call__(self, block: pa.Table) -> pa.Table:
        if self._work is None:
            from clipray.pipelines.decode_ahead import DecodeBlocks

            self._work = DecodeBlocks(self.settings, self.report)
        result: pa.Table = self._work(block)
        return result


class Encode:
    """Blocks of manifest rows, or of pixels -> rows of the table, in an actor; see `EncodeBlocks`, `EncodeTexts` and so on."""

    def __init__(self, settings: EncodeSettings | TextSettings, report: Reporter) -> None:
        report({"starting": os.getpid()})
        self._work: Callable[[pa.Table], pa.Table]
        with fatal(report):
            self._work = self._made(settings, report)

    @staticmethod
    def _made(settings: EncodeSettings | TextSettings, report: Reporter) -> Callable[[pa.Table], pa.Table]:
        if isinstance(settings, AttackSettings):
            from clipray.pipelines.attack import AttackBlocks

            return AttackBlocks(settings, report)
        if isinstance(settings, RegionSettings):
            from clipray.pipelines.region import RegionBlocks

            return RegionBlocks(settings, report)
        if isinstance(settings, CloudSettings):
            from clipray.pipelines.point_cloud import CloudBlocks

            return CloudBlocks(settings, report)
        if isinstance(settings, PairSettings):
            from clipray.pipelines.caption import ScorePairs

            return ScorePairs(settings, report)
        if isinstance(settings, TextSettings):
            from clipray.pipelines.text import EncodeTexts

            return EncodeTexts(settings, report)
        from clipray.pipelines.image import EncodeBlocks

        return EncodeBlocks(settings, report)

    def __call__(self, block: pa.Table) -> pa.Table:
        return self._work(block)


def encode_classes(work: ClassTexts) -> Any:
    """A task; see `class_texts.encode_classes`."""
    from clipray.pipelines import class_texts

    return class_texts.encode_classes(work)
