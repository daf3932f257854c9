"""When too many rows are rejected: what a person is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipray import tables
from clipray.errors import RejectRateError
from clipray.steps.base.encode_step import EncodeStep
from clipray.tables.reasons import passing


def too_many(step: EncodeStep[Any], reasons: Mapping[str, int]) -> RejectRateError:
    """The end of a run whose rows were rejected, counted by reason, beyond `max_reject_rate`."""
    rejected, rows = sum(reasons.values()), step.scan.rows
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    again = passing(reasons) if step.retry else 0
    passes = f"the same run again tries {again} of them, whose reasons may pass; " if again else ""
    return RejectRateError(
        f"{rejected} of {rows} rows were rejected ({rejected / max(1, rows):.1%}), more than max_reject_rate={step.settings.max_reject_rate:g}: "
        f"{listed}{_example(step)}. All rows written are kept. See {step.rejects.url}; {passes}mend the rows and run with --retry-rejects, or raise max_reject_rate"
    )


def _example(step: EncodeStep[Any]) -> str:
    key = step.manifest.kind.key
    for name in tables.shard_names(step.rejects)[:1]:
        row = tables.read_shard(step.rejects, name, [key, "message"]).slice(0, 1).to_pylist()[0]
        return f"; e.g. {row[key]!r}: {row['message']}"
    return ""
