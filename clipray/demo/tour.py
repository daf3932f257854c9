"""`clipray demo`: writes the built-in world and a job over it, and shows what the tables are good for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from PIL import Image

from clipray.demo.world import write_world
from clipray.errors import JobError
from clipray.job.load import dump_job
from clipray.report.plots import contact_sheet, scatter
from clipray.storage.folder import Folder, absolute
from clipray.storage.uris import is_local
from clipray.tables.scan import scan_table

TYPICAL = 10  # images of a cluster on its sheet


@dataclass(frozen=True)
class Neighbours:
    """An image and the images whose vectors are nearest to its own, by caption."""

    image_id: str
    caption: str
    nearest: list[tuple[str, float]]


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


def write_demo(out: str) -> str:
    """Write the world to `out`/world and `jobs/demo.yaml`, with its paths under `out`, to `out`/job.yaml.

    Returns:
        The path of the job file. The same seed every time, so a demo that was killed goes on.

    Raises:
        JobError: `out` is no folder of this machine.
    """
    if not is_local(out):
        raise JobError(f"{out}: expected a folder on this machine for the images of the demo")
    home = absolute(out)
    world = write_world(Path(home) / "world")
    job = yaml.safe_load((_jobs_folder() / "demo.yaml").read_text(encoding="utf-8"))
    Folder(home).write("job.yaml", dump_job(_moved(job, f"{job['output']}/", f"{world.folder.parent}/")))
    return f"{home}/job.yaml"


def _moved(value: Any, before: str, after: str) -> Any:
    """Plain values in which each path under `before` lies under `after`."""
    if isinstance(value, dict):
        return {key: _moved(inner, before, after) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, before, after) for inner in value]
    inside = isinstance(value, str) and f"{value}/".startswith(before)
    return (after + value[len(before) :]).rstrip("/") if inside else value


def _jobs_folder() -> Path:
    package = Path(__file__).parent.parent
    packaged = package / "jobs"  # in a wheel; in a checkout they lie beside the package
    return packaged if packaged.is_dir() else package.parent / "jobs"


def nearest_images(table_url: str, *, examples: int = 4, top: int = 3) -> tuple[list[Neighbours], float]:
    """Look around in the demo's `images` table.

    Returns:
        (a few images with their `top` nearest others, the share of single things whose nearest other single thing
        has the same label)
    """
    rows = scan_table(table_url).filter(pl.col("kind") == "single").sort("image_id").collect()
    vectors = rows["clip"].to_numpy()  # (n, d), L2-normalised
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    order = np.argsort(-cosines, axis=1)[:, :top]  # (n, top)
    ids, labels, captions = (rows[name].to_list() for name in ("image_id", "label", "caption"))
    same = float(np.mean([labels[row[0]] == labels[n] for n, row in enumerate(order)]))
    step = max(1, len(ids) // examples + 3)  # not a multiple of the classes, which come in turn
    shown = [
        Neighbours(ids[n], captions[n], [(captions[m], float(cosines[n, m])) for m in order[n]])
        for n in range(0, len(ids), step)
    ]
    return shown[:examples], same


def style_figures(table_url: str) -> list[tuple[str, str, int, dict[str, float]]]:
    """Of the demo's `label_figures`: data set, style, images, and the figures by name."""
    groups = scan_table(table_url).collect().partition_by("data_set", "style", "n", as_dict=True)
    return [(*key, dict(rows.select("metric", "value").iter_rows())) for key, rows in groups.items()]


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
    plot = Path(out) / "scatter.png"
    plot.write_bytes(scatter(points["clip"].to_numpy()[:, :2], groups, title=title, axes=(axes[0], axes[1])))
    return [sheet, plot]


def _title(view: ClusterView) -> str:
    label, count = view.commonest
    shown = f"; {count} of {view.labelled} labels say {label}" if count else "; none has a label"
    return f"cluster {view.cluster_id}: {view.size} images{shown}"
