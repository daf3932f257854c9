"""Step `cluster`: a vector column -> the `clusters` table, by K-means over vectors that actors hold in memory.

The centroids are kept after every iteration, with all that the next one needs, so that a killed run goes on from there
and ends in the same centroids to the bit. The last pass ranks in fp32 and writes the table.
"""

from __future__ import annotations

import functools
import io
import json
import time
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from clipray import tables
from clipray.analysis.errors import DataError
from clipray.analysis.kmeans import KMeans, best_start, kmeans
from clipray.errors import ClipRayError, JobError, SchemaError
from clipray.inputs.vector_column import open_vectors
from clipray.job import Cluster
from clipray.steps.base.monitor import Ticker
from clipray.steps.base.step import RunContext, StepContext
from clipray.steps.base.table_step import Outcome, VectorStep
from clipray.storage.folder import Folder
from clipray.tables.started import read_started

if TYPE_CHECKING:
    from clipray.engine.vector_actors import VectorActorPool

CHECKPOINT = "_checkpoint.npz"


@dataclass(frozen=True)
class ClusterStep(VectorStep[Cluster]):
    """A `Step`; see `VectorStep`. Beside its table lie the centroids."""

    table_type: ClassVar[str] = "clusters"
    companion_type: ClassVar[str] = "centroids"

    @property
    def description(self) -> str:
        settings, values = self.settings, self.total * self.source.n_features
        value_bytes = {"float16": 2, "none": 0}.get("none" if settings.mini_batch else settings.hold, 6)
        held = f"{values * value_bytes / 2**20:.1f} MiB in memory" if value_bytes else "not held in memory"
        return f"{super().description}, {held}, {settings.clusters} clusters"

    def make(self, run: RunContext) -> Outcome:
        """Iterate from the last checkpoint, assign. Raises SchemaError, JobError: vectors that cannot be clustered."""
        from clipray.engine.vector_actors import Holding, held

        began = time.monotonic()
        cluster, settings = run.cluster(), self.settings
        self._forget_another_input()
        self.begin(keep=False)
        normalize = settings.spherical or settings.normalize == "l2"
        hold = "none" if settings.mini_batch else settings.hold
        with held(self.source, cluster, Holding(normalize, hold, settings.precision), settings.actors) as data:
            facts = data.facts()
            if not facts["held"]:
                run.say(f"{self.name}: the vectors are read again at each iteration, not held in memory")
            loaded_s = time.monotonic() - began
            state = self._iterate(run, data)
            iterations_s = time.monotonic() - began - loaded_s
            write = functools.partial(_write, self, facts["precision"])
            parts = data.finish(state.centroids, write, settings.rows_per_file)
            sample = data.sample(min(5_000, self.total), settings.random_state)
        summary = {
            "iterations": state.n_iterations,
            "converged": state.converged,
            "loading_s": round(loaded_s, 2),
            "iterations_s": round(iterations_s, 2),
            **facts,
        }
        return self._measured(state, parts, sample, summary)

    def _forget_another_input(self) -> None:
        """Remove a checkpoint of other vectors, before the note says that these are begun."""
        before = read_started(self.table) or {}
        if (before.get("fingerprint"), before.get("digest")) != (self.fingerprint, self.digest):
            self.table.remove(CHECKPOINT)

    def _iterate(self, run: RunContext, data: VectorActorPool) -> KMeans:
        settings = self.settings
        start: KMeans | np.ndarray | None = _load(self.table)
        if isinstance(start, KMeans):
            run.say(f"{self.name}: goes on after iteration {start.n_iterations}")
        ticker = Ticker(run, self.name, self.total, "iterating")

        def keep(state: KMeans) -> None:
            _save(self.table, state)
            ticker.at(0, 0, f"iteration {state.n_iterations}, inertia {state.inertia[-1]:.6g}")

        try:
            if start is None and settings.n_init > 1:
                start = best_start(data, settings.clusters, settings.n_init, settings.random_state, settings.spherical)
            return kmeans(
                data,
                settings.clusters,
                batch_rows=settings.mini_batch,
                max_iter=settings.max_iterations,
                tol=settings.tolerance,
                random_state=settings.random_state,
                spherical=settings.spherical,
                start=start,
                on_iteration=keep,
            )
        except DataError as error:
            raise JobError(f"{self.name}: {self.source.name}: {error}") from error
        except ClipRayError as error:
            raise type(error)(f"{self.name}: {self.source.name}: {error}") from error

    def tidy(self, record: tables.Record) -> None:  # noqa: ARG002 - of steps whose files the record names
        self.table.remove(CHECKPOINT)

    def _measured(
        self, state: KMeans, parts: list[ClusteredShard], sample: np.ndarray, summary: dict[str, Any]
    ) -> Outcome:
        """Write the centroids; measure the clusters."""
        from clipray.steps.vectors.cluster_metrics import cluster_metrics

        provenance = {"precision": summary["precision"]}
        sizes, inertia = (np.sum([getattr(part, name) for part in parts], axis=0) for name in ("sizes", "inertia"))
        schema = tables.arrow_schema("centroids", {self.source.column: self.source.n_features})
        columns = [
            pa.array(range(len(state.centroids)), pa.int32()),
            pa.array(sizes),
            pa.array(inertia),
            pa.array(_nearest_ids(parts), pa.string()),
            tables.vector_array(state.centroids, schema.field(self.source.column).type),
        ]
        self.write_companion(pa.table(columns, schema=schema), provenance=provenance)
        metrics = cluster_metrics(self, state, sizes, inertia, sample)
        summary = {**summary, **{m.metric: round(m.value, 6) for m in metrics if m.group is None}}
        return Outcome([part.shard for part in parts], summary, metrics, provenance)


@dataclass(frozen=True)
class ClusteredShard:
    """A shard of the table, and by cluster its rows' number (k,), inertia (k,), and nearest row: distance, identity."""

    shard: tables.Shard
    sizes: np.ndarray
    inertia: np.ndarray
    nearest: dict[int, tuple[float, str]]


def _write(
    step: ClusterStep, precision: str, ids: pa.Table, labels: np.ndarray, squares: np.ndarray, first_row: int
) -> ClusteredShard:
    """Write a shard, where the vectors are."""
    k, distances = step.settings.clusters, np.sqrt(squares)
    rows = pa.table([*ids.columns, tables.number_array(labels), tables.number_array(distances)], schema=step.schema)
    metadata = {**step.shard_metadata, "precision": precision}
    shard = tables.write_shard(step.table, f"part-{first_row:012d}.parquet", step.table_type, rows, metadata)
    order = np.lexsort((squares, labels))
    firsts = order[np.unique(labels[order], return_index=True)[1]]
    keys = ids[step.source.ids[-1]].take(tables.number_array(firsts)).to_pylist()
    nearest = {int(labels[n]): (float(squares[n]), key) for n, key in zip(firsts, keys, strict=True)}
    return ClusteredShard(shard, np.bincount(labels, minlength=k), np.bincount(labels, squares, k), nearest)


def _nearest_ids(parts: list[ClusteredShard]) -> list[str | None]:
    """Identity of the row nearest to each centroid; of two equally near the one whose identity sorts first."""
    best: dict[int, tuple[float, str]] = {}
    for part in parts:
        for label, nearest in part.nearest.items():
            best[label] = min(nearest, best.get(label, nearest))
    return [best[label][1] if label in best else None for label in range(len(parts[0].sizes))]


def _save(folder: Folder, state: KMeans) -> None:
    sink = io.BytesIO()
    facts = json.dumps({"converged": state.converged}).encode()
    counts: dict[str, Any] = {} if state.counts is None else {"counts": state.counts}
    inertia = np.array(state.inertia)
    np.savez(sink, centroids=state.centroids, inertia=inertia, facts=np.frombuffer(facts, np.uint8), **counts)
    folder.write(CHECKPOINT, sink.getvalue())


def _load(folder: Folder) -> KMeans | None:
    data = folder.read(CHECKPOINT)
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data)) as kept:
            converged = json.loads(kept["facts"].tobytes())["converged"]
            counts = kept.get("counts")
            return KMeans(kept["centroids"], tuple(kept["inertia"].tolist()), converged, counts)
    except (ValueError, KeyError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None  # damaged, as the checksums of its members say: the iterations begin anew


def open_step(settings: Cluster, context: StepContext) -> ClusterStep:
    """Open the input. Raises JobError, SchemaError, ManifestError: it is not there, or has fewer rows than clusters."""
    source = open_vectors(settings.input, context.output)
    if source.n_samples < settings.clusters:
        raise SchemaError(
            f"{settings.name}: n_samples={source.n_samples} of {source.name} should be >= clusters={settings.clusters}"
        )
    return ClusterStep(settings, context.output, source)
