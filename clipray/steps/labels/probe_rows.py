"""The rows that a probe learns from: vectors with known labels, in three splits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipray.analysis.probe import SPLITS, split
from clipray.errors import SchemaError, listed
from clipray.inputs.key_index import hash_strings, seed_of
from clipray.inputs.known_labels import NONE, KnownLabels, read_labelled
from clipray.inputs.vector_column import VectorColumn, read_finite
from clipray.job import Probe
from clipray.storage.folder import Folder

SPLIT_NAMES = {"train": 0, "training": 0, "validation": 1, "val": 1, "valid": 1, "test": 2}


@dataclass(frozen=True, eq=False)
class Rows:
    """Vectors (n, d), numbers of their classes (n,), splits (n,) into SPLITS.

    Attributes:
        labels: of the classes that there are rows to train on, sorted; the number of any other is NONE.
    """

    labels: list[str]
    x: np.ndarray
    codes: np.ndarray
    splits: np.ndarray

    def of(self, *names: str) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and classes of some splits; to train on, only those of `labels`."""
        chosen = np.isin(self.splits, [SPLITS.index(name) for name in names])
        chosen &= (self.codes != NONE) | ("train" not in names)
        return self.x[chosen], self.codes[chosen]


def labelled_rows(settings: Probe, source: VectorColumn, output: Folder) -> Rows:
    """Read the vectors whose labels are known.

    Raises:
        SchemaError: fewer than two classes, or none to train on or to validate with.
    """
    assert settings.truth is not None
    known = read_labelled(settings.truth, output, settings.split)
    used = min(1.0, settings.max_rows / len(known.index))
    named = _splits_named(known, settings.split) if settings.split else None
    xs, names, splits = [], [], []
    for row_group in source.row_groups:
        ids, x = read_finite(source, row_group)
        at, key = known.places(ids), ids[source.ids[-1]]
        draw = _fraction(key, settings.random_state)
        chosen = (at != NONE) & (_fraction(key, settings.random_state + 1) < used)
        part = split(draw, settings.validation_share, settings.test_share) if named is None else named[at]
        if named is not None and not (named == 1).any():
            part = np.where((part == 0) & (draw < settings.validation_share), 1, part)
        chosen &= part >= 0
        xs.append(x[chosen])
        names.append(known.codes[at[chosen]])
        splits.append(part[chosen])
    return _checked(source.name, known, np.concatenate(xs), np.concatenate(names), np.concatenate(splits))


def _splits_named(known: KnownLabels, column: str) -> np.ndarray:
    """(n,) int8: the split of each labelled row by a column, -1 where it is none."""
    of_group = np.array([SPLIT_NAMES.get(name.lower(), -1) for name in known.groups], np.int8)
    if not (of_group == 0).any():
        raise SchemaError(
            f"split {column!r}: expected values `train`, `validation` and `test`, found {listed(known.groups)}"
        )
    return of_group[known.group_codes]


def _checked(name: str, known: KnownLabels, x: np.ndarray, codes: np.ndarray, splits: np.ndarray) -> Rows:
    counts = Counter(np.array(SPLITS)[splits].tolist())
    if not counts["train"] or not counts["validation"]:
        raise SchemaError(
            f"{name}: {len(codes)} rows have a known label of {known.source}: {counts['train']} to train on and "
            f"{counts['validation']} to validate with; both need some"
        )
    learnt = np.unique(codes[splits == 0])
    if len(learnt) < 2:
        raise SchemaError(f"{name}: the rows to train on are all {known.names[learnt[0]]!r}; a probe needs two classes")
    labels = sorted(known.names[n] for n in learnt)
    number = {label: n for n, label in enumerate(labels)}
    return Rows(labels, x, np.array([number.get(label, NONE) for label in known.names])[codes], splits)


def _fraction(ids: pa.ChunkedArray, random_state: int) -> np.ndarray:
    """(n,) float64 in [0, 1), the same for an id wherever and whenever."""
    return (hash_strings(ids, seed_of("split", random_state)) >> np.uint64(11)) * 2.0**-53
