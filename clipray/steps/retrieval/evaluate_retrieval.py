"""Step `evaluate_retrieval`: a vector column or ranked lists, and what should be found -> the table `retrieval`.

All rows are ranked, exactly, but no ranking is ever made: see `clipray.steps.retrieval.ranks`. The driver holds the ground
truth and the vectors that it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray.analysis import retrieval as rt
from clipray.errors import SchemaError
from clipray.inputs.relevance import GroundTruth, RelevanceSource, open_relevance, read_relevance
from clipray.inputs.vector_column import VectorColumn, open_vectors, refuse_other_space
from clipray.job import EvaluateRetrieval
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, TableStep
from clipray.steps.retrieval.lists import NOT_FOUND, Lists, negatives_listed, open_lists
from clipray.steps.retrieval.ranks import bounds_of, negatives_before
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

GIVEN = "given"  # the distance of a list that the job gives
Row = tuple[dict[str, Any], rt.QueryFigures]


@dataclass(frozen=True)
class EvaluateRetrievalStep(TableStep[EvaluateRetrieval]):
    """A `Step`; see `TableStep`. `ranked`: what is ranked, or lists that are; `queries`: another column of theirs."""

    table_type: ClassVar[str] = "retrieval"
    row_for_row: ClassVar[bool] = False

    ranked: VectorColumn | Lists
    queries: VectorColumn | None
    relevance: RelevanceSource

    @property
    def total(self) -> int:
        """Rows that are ranked, or entries of the lists."""
        return self.ranked.n_samples if isinstance(self.ranked, VectorColumn) else self.ranked.record.rows

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        ground_truth: dict[str, Any] = {"ground_truth": self.relevance.identity}
        if isinstance(self.ranked, Lists):
            return {**ground_truth, "neighbours": self.ranked.record.fingerprint}
        queries = self.queries.identity if self.queries else None
        return {**ground_truth, "input": self.ranked.identity, "queries": queries}

    @property
    def row_provenance(self) -> dict[str, Any]:
        inputs = {"name": self.ranked.name, "ground_truth": self.relevance.identity, "digest": self.digest}
        return {"inputs": {**inputs, "queries": self.queries.name if self.queries else None}}

    @property
    def inputs(self) -> str:
        return self.ranked.name

    @property
    def inputs_digest(self) -> Digest:
        ranked = self.ranked.digest if isinstance(self.ranked, VectorColumn) else self.ranked.record.files
        return combined([ranked, self.queries.digest if self.queries else None, self.relevance.digest])

    @property
    def description(self) -> str:
        what = "entries of" if isinstance(self.ranked, Lists) else "rows ranked of"
        return f"{self.total} {what} {self.ranked.name}, by {self.relevance.path}"

    def make(self, run: RunContext) -> Outcome:
        """Count, measure. Raises SchemaError: unknown ids in the ground truth, or vectors that cannot be ranked."""
        truth = read_relevance(self.relevance)
        if self.queries is None:
            truth = truth.without_own()
        if not truth.positive.any():
            raise SchemaError(f"{self.relevance.path}: no query has a positive")
        if isinstance(self.ranked, Lists):
            before = {GIVEN: negatives_listed(self.ranked, truth)}
        else:
            before = negatives_before(self.ranked, self.queries, truth, self.settings.distances, run, self.name)
        rows = [row for distance, counts in before.items() for row in _figures(truth, distance, counts)]
        self.begin(keep=False)
        return self._measured(truth, rows)

    def _measured(self, truth: GroundTruth, rows: list[Row]) -> Outcome:
        groups: dict[tuple[str, str], list[rt.QueryFigures]] = {}
        for row, figures in rows:
            groups.setdefault((row["distance"], row["protocol"]), []).append(figures)
        order, means, metrics = list(truth.protocols), dict[str, dict[str, float]](), list[Metric]()
        for distance, protocol in sorted(groups, key=lambda group: (group[0], order.index(group[1]))):
            of_group = groups[distance, protocol]
            means[f"{protocol}/{distance}"] = of_metrics = rt.means(of_group)
            group = protocol if distance == GIVEN else f"{protocol}/{distance}"
            metrics += [Metric(name, mean, group, len(of_group)) for name, mean in of_metrics.items()]
        shard = self.write(pa.Table.from_pylist([row for row, _ in rows], schema=self.schema))
        left_out = {
            protocol: len(truth.queries) - len(np.unique(truth.query[np.isin(truth.relation, wanted)]))
            for protocol, wanted in truth.protocols.items()
        }
        summary: dict[str, Any] = {
            "queries": len(truth.queries),
            "queries_without_positives": left_out,
            **{m: {group: round(of[m], 6) for group, of in means.items()} for m in ("mAP", "mP@10", "recall@5")},
        }
        return Outcome([shard], summary, metrics)


def _figures(truth: GroundTruth, distance: str, before: np.ndarray) -> Iterator[Row]:
    """Rows of the table, each with its figures. before: (m,) of the pairs that are positive in some protocol."""
    relation, bounds = truth.relation[truth.positive], bounds_of(truth.query[truth.positive], len(truth.queries))
    named = np.bincount(truth.query, minlength=len(truth.queries))
    for q, query_id in enumerate(truth.queries.to_pylist()):
        relations, counts = relation[bounds[q] : bounds[q + 1]], before[bounds[q] : bounds[q + 1]]
        for protocol, wanted in truth.protocols.items():
            positives = counts[np.isin(relations, wanted)]
            if not len(positives):
                continue
            figures = rt.query_figures(positives[positives != NOT_FOUND], len(positives))
            row = {
                "query_id": query_id, "protocol": protocol, "distance": distance, "ap": figures.ap,
                **{f"p_at_{k}": value for k, value in zip(rt.TOPS, figures.precision, strict=True)},
                "first_rank": figures.first_rank, "positives": len(positives), "found": figures.n_found,
                "junk": int(named[q]) - len(positives),
            }  # fmt: skip
            yield row, figures


def open_step(settings: EvaluateRetrieval, context: StepContext) -> EvaluateRetrievalStep:
    """Open what is ranked, queries and ground truth. Raises as `open_vectors`, `open_lists` and `open_relevance`."""
    relevance = open_relevance(settings.ground_truth, settings.query_id, settings.answer_id)
    if settings.neighbours is not None:
        lists = open_lists(settings.neighbours, context.output, settings.answer_id)
        return EvaluateRetrievalStep(settings, context.output, lists, None, relevance)
    assert settings.input is not None
    source = open_vectors(settings.input, context.output)
    queries = open_vectors(settings.queries, context.output) if settings.queries is not None else None
    if queries is not None:
        refuse_other_space(settings.name, queries, source)
    return EvaluateRetrievalStep(settings, context.output, source, queries, relevance)
