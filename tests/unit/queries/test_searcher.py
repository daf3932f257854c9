"""A searcher: rows, mixtures, filters and many threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from clipray.errors import JobError, SchemaError
from clipray.queries.answer import Hit
from clipray.queries.searcher import Part, Searcher


@pytest.fixture
def searcher(queried_run: str) -> Searcher:
    return Searcher(queried_run, "index")


def ids(searcher: Searcher, numbers: np.ndarray) -> list[str]:
    return [row["image_id"] for row in searcher.columns.rows(numbers, ["image_id"])]


def test_a_row_is_nearest_to_itself_and_may_be_left_out(searcher: Searcher) -> None:
    vector = searcher.vector_of("42.jpg")
    numbers = searcher.search(vector, 3)[1]
    assert ids(searcher, numbers[0])[0] == "42.jpg"
    without = searcher.search(vector, 3, leave_out=["42.jpg", "nobody"])
    assert without[0].shape == (1, 3)
    assert without[1][0, :2].tolist() == numbers[0, 1:].tolist()
    only = searcher.search(
        vector, 3, mask=searcher.columns.mask("image_id in ('42.jpg', '3.jpg')"), leave_out=["42.jpg"]
    )
    assert ids(searcher, only[1][0]) == ["3.jpg"]


def test_filtered_answers_are_those_of_brute_force(searcher: Searcher) -> None:
    mask = searcher.columns.mask("colour = 'red' and width > 120")
    queries = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    numbers = searcher.search(queries, 4, mask)[1]
    for query, row in zip(queries, numbers, strict=True):
        vectors = {
            n: searcher.vector_of(name) for n, name in zip(np.flatnonzero(mask), ids(searcher, np.flatnonzero(mask)))
        }
        assert row.tolist() == sorted(vectors, key=lambda n: -float(vectors[n] @ query))[:4]


def test_parts_are_mixed_by_weight(searcher: Searcher) -> None:
    a, b = searcher.vector_of("1.jpg"), searcher.vector_of("2.jpg")
    mixed = searcher.vector([Part(like="1.jpg"), Part(-0.5, like="2.jpg")])
    np.testing.assert_allclose(mixed, (a - b / 2) / np.linalg.norm(a - b / 2), atol=1e-6)
    assert searcher.vector([Part(like="1.jpg")]).tolist() == a.tolist()
    with pytest.raises(JobError, match="cancel each other out"):
        searcher.vector([Part(like="1.jpg"), Part(-1, like="1.jpg")])
    for parts in ([], [Part()], [Part(text="a", like="b")]):
        with pytest.raises(JobError, match="expected a query of words, an image or a row's id"):
            searcher.vector(parts)


def test_hits_have_what_is_asked_for(searcher: Searcher) -> None:
    numbers = np.array([searcher.row_numbers.number(name) for name in ("7.jpg", "5.jpg", "unknown")] + [-1])
    hits = searcher.hits(np.array([0.5, 0.25, 0.125, 0]), numbers, ["colour", "kept"])
    assert hits == [
        Hit(1, "7.jpg", 0.5, "", values={"colour": "blue", "kept": True}),
        Hit(2, "5.jpg", 0.25, "/photos/5.jpg", values={"colour": None, "kept": False}),
        Hit(3, "unknown", 0.125, "", values={"colour": None, "kept": True}),
    ]
    with pytest.raises(JobError, match="no column 'color'"):
        searcher.hits(np.zeros(1), numbers[:1], ["color"])


def test_regions_have_boxes(queried_run: str) -> None:
    searcher = Searcher(queried_run, by_region=True)
    assert searcher.is_by_region
    (hit,) = searcher.hits(*(answer[0] for answer in searcher.search(searcher.vector_of("4.jpg#g1"), 1)))
    assert (hit.image_id, hit.region_id, hit.box, hit.uri) == ("4.jpg", "4.jpg#g1", (0, 1, 11, 20), "/photos/4.jpg")


def test_what_cannot_be_answered_is_told(searcher: Searcher, queried_run: str) -> None:
    assert not searcher.can_encode
    assert searcher.is_ready
    with pytest.raises(SchemaError, match="vectors of which no model is known: words and new images cannot be"):
        searcher.encode_texts(["a"])
    with pytest.raises(JobError, match="nobody: index index has no such row; it has "):
        searcher.vector_of("nobody")
    with pytest.raises(SchemaError, match="queries of 3 values, expected 8"):
        searcher.search(np.zeros((1, 3), np.float32), 1, np.ones(61, bool))


def test_many_threads_get_the_answers_of_one(searcher: Searcher) -> None:
    def answer(n: int) -> list:
        vector = searcher.vector_of(f"{n}.jpg")
        scores, numbers = searcher.search(vector, 3, searcher.columns.mask(f"width > {100 + n % 5}"))
        return searcher.hits(scores[0], numbers[0], ["colour", "labels.label"])

    answers: dict[int, list] = {}
    threads = [threading.Thread(target=lambda n=n: answers.update({n: answer(n)})) for n in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {n: answer(n) for n in range(40)}
