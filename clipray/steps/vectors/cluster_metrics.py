"""How good clusters are: inertia, sizes, silhouette, and, against labels, purity, NMI and ARI."""

from __future__ import annotations

import numpy as np
import polars as pl
from scipy import sparse

from clipray import tables
from clipray.analysis.agreement import agreement
from clipray.analysis.kmeans import KMeans
from clipray.errors import SchemaError
from clipray.job import Cluster
from clipray.steps.base.table_step import VectorStep
from clipray.tables.metrics import Metric
from clipray.tables.scan import scan_shards, scan_table


def cluster_metrics(
    step: VectorStep[Cluster], state: KMeans, sizes: np.ndarray, inertia: np.ndarray, sample: np.ndarray
) -> list[Metric]:
    """Metrics of a clustering whose shards are written.

    Args:
        sizes, inertia: (k,) by cluster. sample: (m, d) float32 vectors.
    """
    n = int(sizes.sum())
    metrics = [Metric("inertia", value, f"iteration {i + 1}", n) for i, value in enumerate(state.inertia)]
    metrics += [
        Metric("inertia", float(inertia.sum()), None, n),
        Metric("clusters_empty", float((sizes == 0).sum()), None, n),
        Metric("cluster_size_min", float(sizes.min()), None, n),
        Metric("cluster_size_max", float(sizes.max()), None, n),
        Metric("imbalance", float(len(sizes) * np.square(sizes / n).sum()), None, n),
    ]
    metrics += _silhouette(sample, state.centroids)
    if step.settings.labels:
        metrics += _against_labels(step, step.settings.labels)
    return metrics


def _silhouette(sample: np.ndarray, centroids: np.ndarray) -> list[Metric]:
    """Mean silhouette of a sample (Rousseeuw 1987), where at least two clusters are in it."""
    from sklearn.metrics import pairwise_distances_argmin, silhouette_score

    labels = pairwise_distances_argmin(sample, centroids)
    if not 2 <= len(np.unique(labels)) < len(sample):
        return []
    return [Metric("silhouette", float(silhouette_score(sample, labels)), None, len(sample))]


def _against_labels(step: VectorStep[Cluster], reference: str) -> list[Metric]:
    """Purity, normalised mutual information and adjusted Rand index, over the rows that have a label."""
    name, _, column = reference.rpartition(".")
    if not name:
        raise SchemaError(f"labels {reference!r}: expected `table.column`")
    url = step.output.named(name).url
    labels = scan_table(url, ["image_id", column]).drop_nulls(column)
    clusters = scan_shards(step.table, tables.shard_names(step.table))
    # By 64-bit hashes of the ids, so that no string is held: of a billion rows it is unlikely that two collide.
    counts = (
        labels.select(id=_hash("image_id"), label=pl.col(column).cast(pl.String).cast(pl.Categorical))
        .join(clusters.select("cluster_id", id=_hash(step.source.ids[-1])), on="id")
        .group_by("label", "cluster_id")
        .len("n")
        .select("n", "cluster_id", label=pl.col("label").cast(pl.String).rank("dense") - 1)
        .collect(engine="streaming")
    )
    if counts.is_empty():
        raise SchemaError(f"labels {reference}: no row of {url} has a label and is in the clusters")
    n, cluster, label = counts.cast(pl.Int64).to_numpy().T
    pairs = sparse.coo_matrix((n, (label, cluster)))
    return [Metric(metric, value, None, int(pairs.sum())) for metric, value in agreement(pairs).items()]


def _hash(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).hash()
