"""Average precision and its kin: by hand, against a slow walk down rankings with junk and ties, and the three difficulties."""

from __future__ import annotations

import numpy as np
import pytest

from clipray.analysis import retrieval as rt

POSITIVE, JUNK, NEGATIVE = 0, 1, 2


def walk(order: list[int], n_positives: int) -> dict[str, float]:
    """Down a ranking of kinds, item by item: the area under (recall, precision) points, and what stands among the first k."""
    seen = hits = 0
    area, recall, precision, ranks = 0.0, 0.0, 1.0, []
    for kind in order:
        if kind == JUNK:
            continue
        seen += 1
        hits += kind == POSITIVE
        if kind == POSITIVE:
            ranks.append(seen)
        at = hits / seen
        area += (hits / n_positives - recall) * (precision + at) / 2
        recall, precision = hits / n_positives, at
    found = {"ap": area, "first": ranks[0] if ranks else np.inf}
    for k in (1, 5, 10):
        shown = min(k, ranks[-1]) if len(ranks) == n_positives else k
        found[f"p{k}"] = sum(rank <= shown for rank in ranks) / shown
    return found


def test_two_hundred_random_rankings_with_junk_and_ties() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 80))
        kinds = rng.choice([POSITIVE, JUNK, NEGATIVE], n, p=[0.2, 0.2, 0.6])
        kinds[0] = POSITIVE
        values = rng.integers(0, rng.integers(2, 2 * n), n).astype(float)  # many equal ones
        worst = sorted(range(n), key=lambda i: (-values[i], kinds[i] == POSITIVE))
        expected = walk([kinds[i] for i in worst], int((kinds == POSITIVE).sum()))
        before = rt.count_from(values[kinds == NEGATIVE], values[kinds == POSITIVE])
        found = rt.query_figures(before, int((kinds == POSITIVE).sum()))
        assert found.ap == pytest.approx(expected["ap"], abs=1e-12)
        assert found.precision == pytest.approx([expected["p1"], expected["p5"], expected["p10"]], abs=1e-12)
        assert found.first_rank == expected["first"]
        for _ in range(5):  # and no order of equal ones is worse
            order = np.lexsort((rng.permutation(n), -values))
            other = walk([kinds[i] for i in order], int((kinds == POSITIVE).sum()))
            assert found.ap <= other["ap"] + 1e-12


def test_rankings_that_end_early() -> None:
    """Positives that no list holds count, and add nothing."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        order = rng.choice([POSITIVE, JUNK, NEGATIVE], 12).tolist()
        positives = order.count(POSITIVE) + int(rng.integers(1, 4))
        places = [i for i, kind in enumerate(order) if kind == POSITIVE]
        before = np.array([order[:i].count(NEGATIVE) for i in places], np.int64)
        found, expected = rt.query_figures(before, positives), walk(order, positives)
        assert found.ap == pytest.approx(expected["ap"], abs=1e-12)
        assert found.precision == pytest.approx([expected["p1"], expected["p5"], expected["p10"]], abs=1e-12)
        assert (found.first_rank or np.inf) == expected["first"]


def test_by_hand() -> None:
    # + - + - -: recall steps of 1/2 at ranks 1 and 3; (1 + 1) / 2 and (1/2 + 2/3) / 2.
    assert rt.average_precision(np.array([0, 1]), 2) == pytest.approx((1 + 7 / 12) / 2)
    # - +: precision 0 before, 1/2 at it.
    assert rt.average_precision(np.array([1]), 1) == pytest.approx(0.25)
    assert rt.average_precision(np.array([0, 0, 0]), 3) == 1.0
    assert rt.average_precision(np.array([0]), 4) == pytest.approx(0.25)
    assert rt.average_precision(np.zeros(0, np.int64), 2) == 0.0
    # + + - +: the last positive stands 4th, so the first 10 are the first 4.
    assert rt.precision_at(np.array([0, 0, 1]), 3, 10) == pytest.approx(3 / 4)
    assert rt.precision_at(np.array([0, 0, 1]), 4, 10) == pytest.approx(3 / 10)  # one is not in the list
    assert rt.precision_at(np.array([0, 0, 1]), 3, 1) == 1.0
    found = rt.means(
        [rt.query_figures(np.array([0]), 1), rt.query_figures(np.array([4]), 1), rt.query_figures(np.zeros(0), 1)]
    )
    assert (found["recall@1"], found["recall@5"], found["recall@10"]) == pytest.approx((1 / 3, 2 / 3, 2 / 3))
    assert found["mAP"] == pytest.approx((1 + 0.1 + 0) / 3)


def test_the_three_difficulties() -> None:
    """Ranking: e n h j e n h, e easy, h hard, j junk, n negative."""
    ranking = "enhjenh"
    before = {"e": [0, 1], "h": [1, 2]}
    by_hand = {
        # e n e n: ranks 0 and 2 -> (1 + (1/2 + 2/3) / 2) / 2
        "easy": (1 + (1 / 2 + 2 / 3) / 2) / 2,
        # e n h e n h: ranks 0, 2, 3, 5
        "medium": (1 + (1 / 2 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2 + (3 / 5 + 4 / 6) / 2) / 4,
        # n h n h: ranks 1, 3
        "hard": ((0 + 1 / 2) / 2 + (1 / 3 + 2 / 4) / 2) / 2,
    }
    for protocol, wanted in rt.PROTOCOLS.items():
        letters = "".join("eh"[relation] for relation in wanted)
        kinds = [POSITIVE if c in letters else NEGATIVE if c == "n" else JUNK for c in ranking]
        counts = np.array([count for c in letters for count in before[c]])
        found = rt.average_precision(counts, len(counts))
        assert found == pytest.approx(by_hand[protocol]) == pytest.approx(walk(kinds, len(counts))["ap"])


def test_scores_are_distances_and_equal_vectors_tie() -> None:
    rng = np.random.default_rng(0)
    queries, rows = rng.normal(size=(3, 40)), rng.normal(size=(500, 40)).astype(np.float32) + 5
    rows[7], rows[9] = 0, 3 * rows[8]
    cosine, l2 = (rt.scores(queries, rows, ("cosine", "l2"))[name] for name in ("cosine", "l2"))
    for q in range(3):
        norms = np.linalg.norm(rows.astype(float), axis=1) * np.linalg.norm(queries[q])
        assert np.allclose(
            cosine[q], np.divide(rows @ queries[q], norms, where=norms > 0, out=np.zeros(500)), atol=1e-12
        )
        assert np.allclose(l2[q], -((rows.astype(float) - queries[q]) ** 2).sum(1), atol=1e-10)
    pair = queries[:1].repeat(2, 0), rows[[8, 7]].astype(float)
    starts = rt.thresholds(*pair, "cosine")
    assert starts == pytest.approx(cosine[0, [8, 7]], abs=1e-11)
    assert rt.count_from(cosine[0, [8, 9]], starts[:1]) == [2]  # of one direction: a tie
    for block in (1, 7, 100):  # however it is multiplied
        found = np.concatenate(
            [rt.scores(queries, rows[i : i + block], ["l2"])["l2"] for i in range(0, 500, block)], axis=1
        )
        start = rt.thresholds(queries[:1], rows[8:9].astype(float), "l2")
        assert found[0, 8] >= start[0]
        assert rt.count_from(found[0], start) == (l2[0] >= l2[0, 8]).sum()
