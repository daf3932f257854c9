"""The demo's clusters drawn: a contact sheet with the most typical images of each, and a scatter plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from PIL import Image, ImageDraw, ImageFont

from clipray.report.plots import scatter
from clipray.tables.scan import scan_table

PAPER = (250, 249, 246)
INK = (40, 40, 44)
TITLE_PX = 24
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


def contact_sheet(
    rows: Iterable[tuple[str, Sequence[Image.Image]]], *, side_px: int = 128, gap_px: int = 6
) -> Image.Image:
    """Lay out rows of (title, images); a row without a title follows the one above it closely.

    Images are scaled to fit a square of `side_px`, their aspect kept; rows may be of different lengths.
    """
    rows = list(rows)
    columns = max((len(images) for _, images in rows), default=1)
    width = gap_px + columns * (side_px + gap_px)
    height = gap_px + sum(side_px + gap_px + (TITLE_PX if title else 0) for title, _ in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    pen, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(15), gap_px
    for title, images in rows:
        if title:
            pen.text((gap_px, top + 2), title, fill=INK, font=font)
            top += TITLE_PX
        for column, image in enumerate(images):
            small = image.convert("RGB")
            small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
            left = gap_px + column * (side_px + gap_px)
            sheet.paste(small, (left + (side_px - small.width) // 2, top + (side_px - small.height) // 2))
        top += side_px + gap_px
    return sheet
