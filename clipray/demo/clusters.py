"""The demo's clusters drawn: a contact sheet with the most typical images of each, and a scatter plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
from PIL import Image

from clipray.report.contact_sheet import contact_sheet
from clipray.report.plots import scatter
from clipray.tables.scan import scan_table

TYPICAL = 10  # images of a cluster on the sheet


@dataclass(frozen=True)
class ClusterView:
    """A cluster and what is in it.

    Attributes:
        commonest: the word that most of its labels hold (a label is a colour and a shape), and how many hold it.
        labelled: how many have one.
        typical: paths of the images nearest to the centroid, the nearest first.
    """

    cluster_id: int
    size: int
    commonest: tuple[str, int]
    labelled: int
    typical: list[Path]


def look_at_clusters(out: str) -> list[ClusterView]:
    """What is in each cluster of the run at `out`, the largest first."""
    images = scan_table(f"{out}/images").select("image_id", "uri", pl.col("label").cast(pl.String))
    rows = scan_table(f"{out}/clusters").join(images, on="image_id").sort("distance", "image_id").collect()
    views = [
        _view(cluster_id, members, Path(out) / "world")
        for (cluster_id,), members in rows.partition_by("cluster_id", as_dict=True).items()
    ]
    return sorted(views, key=lambda view: (-view.size, view.cluster_id))


def _view(cluster_id: int, members: pl.DataFrame, world: Path) -> ClusterView:
    labels = members["label"].drop_nulls()
    words = labels.str.split(" ").explode().value_counts().sort("count", "label", descending=[True, False])
    commonest = words.row(0) if len(words) else ("-", 0)
    typical = [world / uri for uri in members["uri"].head(TYPICAL)]
    return ClusterView(cluster_id, len(members), commonest, len(labels), typical)


def write_cluster_images(out: str, views: list[ClusterView]) -> list[Path]:
    """`clusters.png`, a row of typical images for each cluster, and `scatter.png`, the first two components."""
    rows = [(_title(view), [Image.open(path) for path in view.typical]) for view in views]
    sheet = Path(out) / "clusters.png"
    contact_sheet(rows, side_px=96).save(sheet, optimize=True)
    reduced = scan_table(f"{out}/reduced").select("image_id", "clip")
    points = reduced.join(scan_table(f"{out}/clusters"), on="image_id", maintain_order="left").collect()
    components = scan_table(f"{out}/reduced_components").select("component", "variance_ratio").collect()
    shares = dict(components.iter_rows())
    axes = [f"component {n} ({shares[n]:.0%} of the variance)" for n in (0, 1)]
    groups = points["cluster_id"].cast(pl.String).to_list()
    title = f"{len(points)} images of the demo in {len(views)} clusters"
    plot = scatter(
        Path(out) / "scatter.png", points["clip"].to_numpy()[:, :2], groups, title=title, axes=(axes[0], axes[1])
    )
    return [sheet, plot]


def _title(view: ClusterView) -> str:
    label, count = view.commonest
    shown = f"; {count} of {view.labelled} labels say {label}" if count else "; none has a label"
    return f"cluster {view.cluster_id}: {view.size} images{shown}"
