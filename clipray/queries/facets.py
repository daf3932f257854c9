"""What a column holds, for a page of filters: values with their counts, or a range with a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

FEW = 50  # whole numbers that are counted one by one
BINS = 20


@dataclass(frozen=True)
class Facet:
    """What a column holds, over some rows.

    Attributes:
        rows: without nulls. nulls: how many there are.
        values: the most frequent values with their counts, most first; of strings, truth values and few whole numbers.
        n_values: how many different ones there are.
        low, high: the least and the greatest value, of numbers and times; None where there is none.
        bins: rows in each of `BINS` equal parts from `low` to `high`; empty where all values are equal.
    """

    rows: int
    nulls: int
    values: tuple[tuple[Any, int], ...] = ()
    n_values: int = 0
    low: Any = None
    high: Any = None
    bins: tuple[int, ...] = ()


def facet_of(series: pl.Series, top: int) -> Facet:
    """The facet of a column; NaN and infinities count as nulls. top: the values that are counted, of strings."""
    present = series.alias("value").drop_nulls()
    if present.dtype.is_float():
        present = present.filter(present.is_finite())
    nulls = len(series) - len(present)
    is_number = present.dtype.is_numeric() or present.dtype.is_temporal()
    n_values = 0 if present.dtype.is_float() else present.n_unique()
    if not is_number or (present.dtype.is_integer() and n_values <= FEW):
        counts = present.value_counts(name="count").sort("count", "value", descending=[True, False])
        counts = counts.head(FEW if is_number else top)
        counts = counts.cast({"value": pl.String}) if present.dtype == pl.Enum else counts
        ends = (present.min(), present.max()) if is_number else (None, None)
        return Facet(len(present), nulls, tuple(counts.iter_rows()), n_values, *ends)
    low, high = present.min(), present.max()
    return Facet(len(present), nulls, (), n_values, low, high, _bins(present))


def _bins(present: pl.Series) -> tuple[int, ...]:
    numbers = (present.to_physical() if present.dtype.is_temporal() else present).cast(pl.Float64).to_numpy()
    if not len(numbers) or numbers.min() == numbers.max():
        return ()
    return tuple(np.histogram(numbers, BINS)[0].tolist())
