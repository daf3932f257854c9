"""Plots as PNG files, drawn by matplotlib without a display and without its global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DPI = 110
MANY = 10  # groups, beyond which colours come from the larger palette


def scatter(
    path: str | Path, points: np.ndarray, groups: Sequence[str], *, title: str = "", axes: tuple[str, str] = ("", "")
) -> Path:
    """Points in the colours of their groups, each group named at its median.

    Args:
        path: of the PNG file.
        points: (n, 2) float. groups: the group of each point.
        axes: names of the horizontal and the vertical axis.
    """
    from matplotlib import colormaps, patheffects

    figure, plot = _figure(9, 7, title)
    names = sorted(set(groups), key=lambda name: (len(name), name))  # 2 before 10
    palette, member = colormaps["tab10" if len(names) <= MANY else "tab20"], np.array(groups)
    for n, name in enumerate(names):
        own = points[member == name]
        plot.scatter(*own.T, s=14, color=palette(n % palette.N), alpha=0.75, linewidths=0)
        text = plot.text(*np.median(own, axis=0), name, fontsize=12, fontweight="bold", ha="center", va="center")
        text.set_path_effects([patheffects.withStroke(linewidth=3.5, foreground="white")])
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    return _saved(figure, path)


def _figure(width_in: float, height_in: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_title(title, loc="left")
    return figure, plot


def _saved(figure: Any, path: str | Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return Path(path)
