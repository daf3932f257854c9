"""Plots as PNG files, drawn by matplotlib without a display and without its global state; and contact sheets."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
NAMED = 100  # classes whose names fit beside a confusion matrix
PAPER, INK = (250, 249, 246), (40, 40, 44)  # of a contact sheet
TITLE_PX = 24
MANY = 10  # groups, beyond which colours come from the larger palette


def scatter(points: np.ndarray, groups: Sequence[str], *, title: str, axes: tuple[str, str]) -> bytes:
    """A PNG of points in the colours of their groups, each group named at its median.

    Args:
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
    return _png(figure)


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


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sink = io.BytesIO()
    FigureCanvasAgg(figure).print_png(sink)
    return sink.getvalue()


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
