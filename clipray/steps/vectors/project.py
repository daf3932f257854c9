"""Step `project`: a vector column -> the `map` table, a place on a plane for each row.

One pass over the input gives its moments and a sample, from which the layout is fitted; then every row is placed. A run that
goes on fits anew: of the same sample and seed the layout is the same. Where it is not, on another processor perhaps, all
rows are placed again, so that a table never shows two layouts.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis import layout, pca
from clipray.analysis import moments as mm
from clipray.errors import JobError, SchemaError
from clipray.inputs.index_reader import opened_in_worker, ready_index
from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of
from clipray.inputs.vector_column import VectorColumn, open_vectors, read_finite
from clipray.job import Project
from clipray.steps.base.shard_writer import map_row_groups, write_rows
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.storage.parquet import RowGroup
from clipray.tables.digests import Digest, combined
from clipray.tables.metrics import Metric

if TYPE_CHECKING:
    from clipray.engine.tasks import Kept

FIT_ROWS = 131_072  # that a task looks through
AT_ONCE = 4_096  # rows that are placed together
MEASURED = 2_000  # rows of the sample on which trustworthiness is measured
SPARE = 1.2  # times the rows of the sample are drawn, so that it is never short


@dataclass(frozen=True)
class ProjectStep(VectorStep[Project]):
    """A `Step`; see `VectorStep`. index: the record of the index. layout: what else tells one layout from another."""

    table_type: ClassVar[str] = "map"

    index: tables.Record | None
    layout: Mapping[str, str] = field(default_factory=dict)

    @property
    def inputs_digest(self) -> Digest:
        return combined([self.source.digest, self.index.inputs["digest"]]) if self.index else self.source.digest

    @property
    def input_fingerprint(self) -> dict[str, Any]:
        return {**super().input_fingerprint, **({"index": self.index.fingerprint} if self.index else {})}

    @property
    def row_provenance(self) -> dict[str, Any]:
        index = (
            {"index": {"name": self.settings.index, "metric": self.index.provenance["metric"]}} if self.index else {}
        )
        return {**super().row_provenance, **index, **self.layout}

    @property
    def description(self) -> str:
        settings = self.settings
        sample = f" of {min(settings.sample_rows, self.total)} rows" if settings.method == "umap" else ""
        nearest = f", {settings.neighbours} nearest in {settings.index}" if settings.index else ""
        return f"{super().description}, {settings.method}{sample}{nearest}"

    def make(self, run: RunContext) -> Outcome:
        """Fit, place what is missing. Raises SchemaError: vectors that are not finite, all equal, or too few."""
        self.begin()
        places, sample, fitted = self._fit(run)
        step = replace(self, layout={"layout": _hash(places)}) if isinstance(fitted, UmapLayout) else self
        shards = write_rows(step, _placed, (step, fitted), run, "placing", at_once=AT_ONCE)
        summary: dict[str, Any] = {"method": self.settings.method}
        metrics = self._trustworthiness(sample, places)
        if isinstance(fitted, pca.Projection):
            ratios = [round(float(ratio), 6) for ratio in fitted.explained_variance_ratio]
            summary |= {"first_variance_ratios": ratios}
            metrics += [Metric("explained_variance_ratio", round(sum(ratios), 6), n=self.total)]
        summary |= {metric.metric: metric.value for metric in metrics}
        return Outcome(shards, summary, metrics, step.layout)

    def _trustworthiness(self, sample: Sample, places: np.ndarray) -> list[Metric]:
        """Of MEASURED rows of the sample; empty where there are too few."""
        distance = self.settings.metric if self.settings.method == "umap" else "euclidean"
        x, places = sample.x[:MEASURED], places[:MEASURED]
        value = layout.trustworthiness(x, places, distance)
        return [] if value is None else [Metric(f"trustworthiness@{layout.NEIGHBOURS}", round(value, 6), n=len(x))]

    def _fit(self, run: RunContext) -> tuple[np.ndarray, Sample, pca.Projection | UmapLayout]:
        """Places (m, 2) float32 of a sample, the sample, and what places all rows."""
        moments, sample = self._moments_and_sample(run)
        if self.settings.method == "umap":
            places, model = self._fit_umap(run, sample)
            return places, sample, UmapLayout(KeyIndex(sample.keys, self._seed), places, model)
        try:
            projection = pca.fit(moments, n_components=2)
        except ValueError as error:
            raise SchemaError(f"{self.name}: {self.source.name}: {error}") from error
        return projection.transform(sample.x), sample, projection

    def _fit_umap(self, run: RunContext, sample: Sample) -> tuple[np.ndarray, Kept]:
        from clipray.engine.tasks import make_and_keep

        if len(sample.x) <= self.settings.n_neighbors:
            raise SchemaError(
                f"{self.name}: {self.source.name}: a sample of {len(sample.x)} rows, expected more than n_neighbors="
                f"{self.settings.n_neighbors}: the ids repeat, give each row its own"
            )
        run.say(f"{self.name}: UMAP is fitted on {len(sample.x)} rows, in one thread")
        return make_and_keep(_fitted_umap, sample.x, self.settings)

    @property
    def _seed(self) -> int:
        """Of the hashes by which the sample is drawn."""
        return seed_of("map", self.settings.random_state)

    def _moments_and_sample(self, run: RunContext) -> tuple[mm.Moments, Sample]:
        """Of the whole input; the sample are the rows with the lowest hashes, whatever files they lie in."""
        settings = self.settings
        wanted = settings.sample_rows if settings.method == "umap" else MEASURED
        shared = (self._seed, SPARE * wanted / self.total, settings.method == "pca")
        moments, samples = mm.empty(self.source.n_features), []
        for state, drawn in map_row_groups(_looked_through, self.source, FIT_ROWS, run, self.name, "sampling", shared):
            moments = mm.combine(moments, state)
            samples.append(drawn)
        keys, x = (np.concatenate([getattr(drawn, name) for drawn in samples]) for name in ("keys", "x"))
        lowest = np.argsort(keys, kind="stable")[:wanted]
        return moments, Sample(keys[lowest], x[lowest])


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of the input: hashes of their ids (m,) uint64, and their vectors (m, d) float32."""

    keys: np.ndarray
    x: np.ndarray


@dataclass(frozen=True, eq=False)
class UmapLayout:
    """A fitted UMAP.

    Attributes:
        sample: hashes of the ids that it was fitted on. places: (m, 2) float32 of these.
        model: places all other rows.
    """

    sample: KeyIndex
    places: np.ndarray
    model: Kept

    def transform(self, ids: pa.ChunkedArray, x: np.ndarray) -> np.ndarray:
        """Places (n, 2) float32 of vectors (n, d)."""
        positions = self.sample.positions(ids)
        places, others = self.places[positions], np.flatnonzero(positions == ABSENT)
        if len(others):
            places[others] = layout.apply_umap(_model(self.model), x[others])
        return places


@functools.lru_cache(1)
def _model(kept: Kept) -> Any:
    """The fitted model, once in a worker; numba wants arrays that can be written."""
    return copy.deepcopy(kept.read())


def _hash(places: np.ndarray) -> str:
    return f"sha256:{hashlib.sha256(places.tobytes()).hexdigest()[:16]}"


def _fitted_umap(x: np.ndarray, settings: Project) -> tuple[np.ndarray, Any]:
    """Runs in a worker."""
    return layout.fit_umap(
        x, n_neighbors=settings.n_neighbors, min_dist=settings.min_dist, metric=settings.metric,
        random_state=settings.random_state,
    )  # fmt: skip


def _looked_through(
    item: tuple[VectorColumn, list[RowGroup]], shared: tuple[int, float, bool]
) -> tuple[mm.Moments, Sample]:
    """Runs in a worker: moments of some row groups, if they are wanted, and a share of the rows."""
    (source, row_groups), (seed, share, with_moments) = item, shared
    moments, keys, vectors = mm.empty(source.n_features), [], []
    for row_group in row_groups:
        ids, x = read_finite(source, row_group)
        hashes = hash_strings(ids[source.ids[-1]], seed)
        drawn = hashes <= np.uint64(min(share, 1 - 2**-53) * 2**64) if share < 1 else np.ones(len(x), bool)
        keys.append(hashes[drawn])
        vectors.append(x[drawn].astype(np.float32))
        if with_moments:
            moments = mm.combine(moments, mm.moments(x))
    return moments, Sample(np.concatenate(keys), np.concatenate(vectors))


def _placed(shared: tuple[ProjectStep, pca.Projection | UmapLayout], ids: pa.Table, x: np.ndarray) -> pa.Table:
    """Runs in a worker: the rows of some vectors (n, d)."""
    step, fitted = shared
    key = ids[step.source.ids[-1]]
    places = fitted.transform(x) if isinstance(fitted, pca.Projection) else fitted.transform(key, x)
    xy = [tables.number_array(places[:, n].astype(np.float32)) for n in (0, 1)]
    return pa.table([*ids.columns, *xy, _neighbors(step, key, x)], schema=step.schema)


def _neighbors(step: ProjectStep, ids: pa.ChunkedArray, x: np.ndarray) -> pa.Array:
    """The nearest other rows of each row, as the table has them."""
    column_type = step.schema.field("neighbors").type
    if step.index is None:
        return pa.nulls(len(x), column_type)
    assert step.settings.index is not None
    opened = opened_in_worker(step.settings.index, step.output, step.index)
    scores, numbers = opened.search(x, step.settings.neighbours + 1)
    known = (numbers >= 0) & opened.others(numbers, ids)
    known &= np.cumsum(known, axis=1) <= step.settings.neighbours
    names = opened.ids.column(opened.ids.column_names[-1]).take(pa.array(numbers[known])).combine_chunks()
    distances = tables.number_array(_distances(scores[known], opened.metric))
    offsets = pa.array(np.concatenate([[0], known.sum(1).cumsum()]), pa.int32())
    fields = list(column_type)
    lists = [pa.ListArray.from_arrays(offsets, v, f.type) for v, f in zip((names, distances), fields, strict=True)]
    return pa.StructArray.from_arrays(lists, fields=fields)


def _distances(scores: np.ndarray, metric: str) -> np.ndarray:
    """Scores of an index as distances, float32: the smaller the nearer."""
    if metric == "l2":
        return np.sqrt(np.maximum(scores, 0))
    return 1 - scores if metric == "cosine" else -scores


def open_step(settings: Project, context: StepContext) -> ProjectStep:
    """Open the input and the index. Raises as `open_vectors` and `ready_index`; JobError: umap-learn is not installed."""
    if settings.method == "umap" and importlib.util.find_spec("umap") is None:
        raise JobError(f'{settings.name}: `method: umap` needs umap-learn: pip install "clipray[umap]"')
    source = open_vectors(settings.input, context.output)
    if settings.method == "umap" and source.n_samples < (least := max(settings.n_neighbors + 1, layout.LEAST_ROWS)):
        raise SchemaError(
            f"{settings.name}: n_samples={source.n_samples} of {source.name} should be >= {least}: UMAP with "
            f"n_neighbors={settings.n_neighbors} needs more rows"
        )
    index = ready_index(settings.index, context.output, source) if settings.index else None
    if index is not None and not source.identity.items() <= index.provenance["input"].items():
        raise SchemaError(
            f"{settings.name}: index {settings.index} is of {index.inputs['input']}, expected one of {source.name}"
        )
    return ProjectStep(settings, context.output, source, index)
