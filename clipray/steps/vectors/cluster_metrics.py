"""How good clusters are: inertia, sizes, silhouette, and, against labels, purity, NMI and ARI."""

from __future__ import annotations

import numpy as np
import pandas as pd

from clipray import tables
from clipray.analysis.kmeans import KMeans
from clipray.errors import SchemaError
from clipray.job import Cluster
from clipray.storage.folder import Folder
from clipray.tables.metrics import Metric


def cluster_metrics(
    settings: Cluster,
    output: Folder,
    table: Folder,
    key: str,
    state: KMeans,
    sizes: np.ndarray,
    inertia: np.ndarray,
    sample: np.ndarray,
) -> list[Metric]:
    """Figures of a finished clustering, whose shards are written.

    Args:
        key: the identity column of `table`. sizes, inertia: (k,) by cluster. sample: (m, d) float32 vectors.
    """
    n = int(sizes.sum())
    found = [Metric("inertia", value, f"iteration {i + 1}", n) for i, value in enumerate(state.inertia)]
    found += [
        Metric("inertia", float(inertia.sum()), None, n),
        Metric("clusters_empty", float((sizes == 0).sum()), None, n),
        Metric("cluster_size_min", float(sizes.min()), None, n),
        Metric("cluster_size_max", float(sizes.max()), None, n),
        Metric("imbalance", float(len(sizes) * np.square(sizes / n).sum()), None, n),
    ]
    found += _silhouette(sample, state.centroids)
    if settings.labels:
        found += _against_labels(settings.labels, output, table, key)
    return found


def _silhouette(sample: np.ndarray, centroids: np.ndarray) -> list[Metric]:
    """Mean silhouette of a sample (Rousseeuw 1987), where at least two clusters are in it."""
    from sklearn.metrics import pairwise_distances_argmin, silhouette_score

    labels = pairwise_distances_argmin(sample, centroids)
    if not 2 <= len(np.unique(labels)) < len(sample):
        return []
    return [Metric("silhouette", float(silhouette_score(sample, labels)), None, len(sample))]


def _against_labels(reference: str, output: Folder, table: Folder, key: str) -> list[Metric]:
    """Purity, normalised mutual information and adjusted Rand index, over the rows that have a label."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    where, _, column = reference.rpartition(".")
    folder = output.named(where)
    if not where:
        raise SchemaError(f"labels {reference!r}: expected `table.column`")
    own = pd.concat(
        [tables.read_shard(table, name, [key, "cluster_id"]).to_pandas() for name in tables.shard_names(table)]
    )
    given = tables.read_table(folder.url, ["image_id", column]).to_pandas()
    joined = own.merge(given, left_on=key, right_on="image_id", how="inner").dropna(subset=[column])
    if joined.empty:
        raise SchemaError(f"labels {reference}: no row of {folder.url} has a label and is in the clusters")
    labels, clusters = joined[column].astype(str), joined["cluster_id"]
    counts = contingency_matrix(labels, clusters)
    return [
        Metric("purity", float(counts.max(axis=0).sum() / counts.sum()), None, len(joined)),
        Metric("nmi", float(normalized_mutual_info_score(labels, clusters)), None, len(joined)),
        Metric("ari", float(adjusted_rand_score(labels, clusters)), None, len(joined)),
    ]
