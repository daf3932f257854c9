"""Near duplicates against all pairs compared one by one, in blocks of any size; groups against a walk over links."""

from __future__ import annotations

import numpy as np
import pytest

from clipray.analysis import duplicates as dd


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def planted(n: int, seed: int = 0) -> np.ndarray:
    """Rows of which a third are near others, in chains too, and some the same."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 16))
    for row in range(n // 3, 2 * n // 3):
        x[row] = x[rng.integers(0, row)] + rng.normal(size=16) * rng.choice([0, 0.05, 0.15, 0.3])
    return unit(x[rng.permutation(n)])


def walked(near: np.ndarray) -> list[set[int]]:
    """Groups of two and more rows, from a matrix of links."""
    left, found = set(range(len(near))), []
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            row = edge.pop()
            group.add(row)
            edge |= set(np.flatnonzero(near[row]).tolist()) - group
        left -= group
        if len(group) > 1:
            found.append(group)
    return sorted(found, key=min)


@pytest.mark.parametrize("block", [3, 50, 2_048])
def test_groups_are_those_of_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dd, "BLOCK", block)
    for seed, threshold in enumerate([0.9, 0.97, 0.999, 1 - 1e-9]):
        x = planted(160, seed)
        cosines = x.astype(np.float64) @ x.astype(np.float64).T
        np.fill_diagonal(cosines, -1)
        links = dd.within(x, threshold)
        labels = dd.groups(links)
        found = [set(links.rows[labels == label].tolist()) for label in range(labels.max(initial=-1) + 1)]
        assert found == walked(cosines >= threshold), (seed, threshold)
        assert seed == 3 or len(found) > 5
        assert links.nearest == pytest.approx(cosines.max(1)[links.rows], abs=1e-6)
        assert len(links.i) == len(links.rows) - len(found)  # a forest


def test_blocks_of_a_long_table_make_the_same_groups() -> None:
    x = planted(300)
    whole = dd.within(x, 0.95)
    parts = [dd.between(x[s : s + 70], s, x[t : t + 40], t, 0.95) for s in range(0, 300, 70) for t in range(0, 300, 40)]
    merged = dd.merged(parts)
    assert np.array_equal(merged.rows, whole.rows)
    assert np.array_equal(dd.groups(merged), dd.groups(whole))
    assert merged.nearest == pytest.approx(whole.nearest, abs=1e-6)
    copies = dd.within(unit(np.ones((500, 4))), 0.9)
    assert (len(copies.i), len(copies.rows), set(dd.groups(copies))) == (499, 500, {0})
    none = dd.within(unit(np.eye(5)), 0.9)
    assert (len(none.rows), len(dd.groups(none))) == (0, 0)


def test_the_first_of_a_group_is_kept() -> None:
    labels = np.array([0, 1, 0, 1, 1])
    assert dd.keepers(labels, np.array([4, 2, 0, 1, 3])).tolist() == [2, 4]
