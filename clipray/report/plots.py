"""Plots as PNG files, drawn by matplotlib without a display and without its global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
NAMED = 100  # classes whose names fit beside a confusion matrix
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
        members = points[member == name]
        plot.scatter(members[:, 0], members[:, 1], s=14, color=palette(n % palette.N), alpha=0.75, linewidths=0)
        x, y = np.median(members, axis=0)
        text = plot.text(x, y, name, fontsize=12, fontweight="bold", ha="center", va="center")
        text.set_path_effects([patheffects.withStroke(linewidth=3.5, foreground="white")])
    plot.set_xlabel(axes[0])
    plot.set_ylabel(axes[1])
    return _saved(figure, path)


def confusion(counts: np.ndarray, labels: Sequence[str], *, title: str = "") -> bytes:
    """A confusion matrix as a PNG: each row's shares as shades, its largest one darkest.

    Args:
        counts: (k, k) rows by known and by given label. labels: of both.
    """
    from matplotlib.ticker import FixedLocator

    k = len(labels)
    side_in = float(np.clip(2.5 + 0.16 * k, 4, 14)) if k <= NAMED else 9.0
    figure, plot = _figure(side_in + 1, side_in, title)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shown = plot.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if k <= NAMED else "antialiased")
    plot.spines[["left", "bottom"]].set_visible(False)
    if k <= NAMED:
        for axis in (plot.xaxis, plot.yaxis):
            axis.set_major_locator(FixedLocator(range(k)))
        size = 9 if k <= 25 else 6
        plot.set_xticklabels(labels, rotation=90, fontsize=size)
        plot.set_yticklabels(labels, fontsize=size)
    plot.set_xlabel("label given")
    plot.set_ylabel("known label")
    figure.colorbar(shown, ax=plot, shrink=0.6, label="share of the row")
    return _png(figure)


def _figure(width_in: float, height_in: float, title: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    plot = figure.add_subplot()
    plot.spines[["top", "right"]].set_visible(False)
    plot.set_title(title, loc="left")
    return figure, plot


def _saved(figure: Figure, path: str | Path) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(_png(figure))
    return Path(path)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)
    return sink.getvalue()
