"""The demo's clusters as pictures: a contact sheet with the most typical pictures of each, and a scatter plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from clipray.report.contact_sheet import contact_sheet
from clipray.report.plots import scatter
from clipray.tables import read_table

TYPICAL = 10  # pictures of a cluster on the sheet


@dataclass(frozen=True)
class ClusterView:
    """A cluster and what is in it.

    Attributes:
        commonest: the word that most of its labels hold (a label is a colour and a shape), and how many hold it.
        labelled: how many have one.
        typical: paths of the pictures nearest to the centroid, the nearest first.
    """

    cluster_id: int
    size: int
    commonest: tuple[str, int]
    labelled: int
    typical: list[Path]


def look_at_clusters(out: str) -> list[ClusterView]:
    """What is in each cluster of the run at `out`, the largest first."""
    pictures = read_table(f"{out}/images", ["image_id", "uri", "label"]).to_pandas()
    rows = read_table(f"{out}/clusters").to_pandas().merge(pictures, on="image_id").sort_values("distance")
    views = [_view(int(number), members, Path(out) / "world") for number, members in rows.groupby("cluster_id")]
    return sorted(views, key=lambda view: (-view.size, view.cluster_id))


def _view(number: int, members: pd.DataFrame, world: Path) -> ClusterView:
    labels = members["label"].dropna()
    counts = labels.str.split().explode().value_counts()
    commonest = (str(counts.index[0]), int(counts.iloc[0])) if len(counts) else ("-", 0)
    typical = [world / uri for uri in members["uri"].head(TYPICAL)]
    return ClusterView(number, len(members), commonest, len(labels), typical)


def write_cluster_pictures(out: str, views: list[ClusterView]) -> list[Path]:
    """`clusters.png`, a row of typical pictures for each cluster, and `scatter.png`, the first two components."""
    rows = [(_title(view), [Image.open(path) for path in view.typical]) for view in views]
    sheet = Path(out) / "clusters.png"
    contact_sheet(rows, side_px=96).save(sheet, optimize=True)
    reduced = read_table(f"{out}/reduced", ["image_id", "clip"]).to_pandas()
    rows_of = reduced.merge(read_table(f"{out}/clusters", ["image_id", "cluster_id"]).to_pandas(), on="image_id")
    share = read_table(f"{out}/reduced_components", ["component", "variance_ratio"]).to_pandas().set_index("component")
    axes = [f"component {n} ({share.loc[n, 'variance_ratio']:.0%} of the variance)" for n in (0, 1)]
    points, groups = np.stack(rows_of["clip"])[:, :2], [str(number) for number in rows_of["cluster_id"]]
    title = f"{len(points)} pictures of the demo in {len(views)} clusters"
    return [sheet, scatter(Path(out) / "scatter.png", points, groups, title=title, axes=(axes[0], axes[1]))]


def _title(view: ClusterView) -> str:
    label, count = view.commonest
    shown = f"; {count} of {view.labelled} labels say {label}" if count else "; none has a label"
    return f"cluster {view.cluster_id}: {view.size} pictures{shown}"
