"""Step `report`: what the steps before it wrote -> one page of HTML, and the table of what is on it.

A page is cheap and holds nothing that the tables do not: where they or its settings changed, it is made anew without being
asked. It needs no Ray.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from clipray import __version__, tables
from clipray.errors import SchemaError
from clipray.job import Report
from clipray.job.load import steps_of
from clipray.report.page import make_page
from clipray.report.run_tables import RunTables, open_run
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, TableStep
from clipray.tables.digests import Digest, digest_of, plain

PAGE = "report.html"


@dataclass(frozen=True)
class ReportStep(TableStep[Report]):
    """A `Step`; see `TableStep`. shown: the tables that it shows."""

    table_type: ClassVar[str] = "report"
    replaces_stale: ClassVar[bool] = True

    title: str
    shown: RunTables

    @property
    def total(self) -> int:
        """Tables."""
        return len(self.shown.tables)

    @property
    def page(self) -> str:
        """Path or URL of the page."""
        return self.table.path(PAGE) if self.table.local else f"{self.table.url}/{PAGE}"

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        made_of = {table.name: table.record.fingerprint for table in self.shown.tables}
        return {"clipray": __version__, "titled": self.title, "tables": made_of, "absent": list(self.shown.absent)}

    @property
    def inputs_digest(self) -> Digest:
        """Of all that the tables' records say: files, figures, when they were finished."""
        return plain(digest_of([table.record.stored() for table in self.shown.tables]))

    @property
    def row_provenance(self) -> dict[str, Any]:
        return {"digest": self.digest}

    @property
    def inputs(self) -> list[str]:
        return [table.name for table in self.shown.tables]

    def is_complete(self) -> bool:
        record = tables.read_record(self.table)
        page_bytes = record.summary.get("page_bytes") if record else None
        return super().is_complete() and self.table.sizes().get(PAGE) == page_bytes

    @property
    def description(self) -> str:
        return f"a page of {self.total} tables"

    def make(self, run: RunContext) -> Outcome:  # noqa: ARG002 - it needs no cluster
        """Make the page. Raises SchemaError: a table is not whole."""
        self.begin(keep=False)
        page = make_page(self.shown, self.title, self.settings)
        self.table.write(PAGE, data := page.html.encode("utf-8", "replace"))
        summary = {"page": PAGE, "page_bytes": len(data), "left_out": page.left_out}
        return Outcome([self.write(self._rows(page.sections))], summary)

    def _rows(self, sections: dict[str, list[str]]) -> pa.Table:
        rows = [
            {"table": table.name, "kind": table.type, "rows": table.record.rows, "rejects": table.record.rejects,
             "sections": ", ".join(sections[table.name])}
            for table in self.shown.tables
        ]  # fmt: skip
        return pa.Table.from_pylist(rows, schema=self.schema)


def open_step(settings: Report, context: StepContext) -> ReportStep:
    """Find the tables that it shows: those that it names, or those of the steps before it.

    Raises:
        SchemaError: one that it names is not finished; there is none at all; images have no such column of labels.
    """
    names = settings.of or earlier_tables(settings, context)
    shown = open_run(context.output, names, settings.label)
    if settings.of and shown.absent:
        raise SchemaError(
            f"{settings.name}: {', '.join(shown.absent)}: no finished table in {context.output.url}; finish it with `clipray run`, "
            "or take it out of `of`"
        )
    if not names:
        raise SchemaError(f"{settings.name}: no step before it writes a table: put it last, or name tables in `of`")
    images = shown.known("images")
    if settings.label != Report.model_fields["label"].default and not any(map(shown.has_label, images)):
        known = {name for table in images for name in table.record.columns}
        raise SchemaError(
            f"{settings.name}: label: no table of images has a column {settings.label!r} of labels; "
            f"columns: {', '.join(sorted(known)) or 'none'}; `keep` of embed_images carries one along"
        )
    return ReportStep(settings, context.output, settings.title or context.job.name, shown)


def earlier_tables(settings: Report, context: StepContext) -> list[str]:
    """All tables of the steps that stand before this one in the job, but other pages."""
    earlier = itertools.takewhile(lambda step: step.name != settings.name, steps_of(context.job))
    return [table for step in earlier if not isinstance(step, Report) for table in step.tables]
