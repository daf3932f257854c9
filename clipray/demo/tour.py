"""`clipray demo`: writes the built-in world and a job over it, and shows what the tables are good for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from clipray.demo.world import write_world
from clipray.errors import JobError
from clipray.job.load import dump_job
from clipray.storage.folder import Folder, absolute
from clipray.storage.uris import is_local
from clipray.tables.scan import scan_table


@dataclass(frozen=True)
class Neighbours:
    """An image and the images whose vectors are nearest to its own, by caption."""

    image_id: str
    caption: str
    nearest: list[tuple[str, float]]


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
