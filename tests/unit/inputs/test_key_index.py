"""Ids as hashes: the same on every machine, and looked up as a dict would."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from clipray.inputs.key_index import ABSENT, KeyIndex, hash_strings, seed_of


def index_of(ids: list[str], seed: int = 7) -> tuple[KeyIndex, np.ndarray]:
    return KeyIndex.of(hash_strings(pa.array(ids, pa.string()), seed), seed)


def test_the_hash_is_that_of_the_reference_implementation() -> None:
    """Of XXH64's authors: `XXH64("", 0)` and `XXH64("a", 0)`. Another hash would have every finished table counted again."""
    assert hash_strings(pa.array(["", "a"]), 0).tolist() == [0xEF46DB3751D8E999, 0xD24EC4F1A98C6E5B]


def test_each_purpose_and_attempt_has_its_seed_and_each_seed_its_hashes() -> None:
    seeds = [seed_of(purpose, attempt) for purpose in ("rows", "lookup") for attempt in range(4)]
    assert len(set(seeds)) == 8
    assert seed_of("rows") == 13_589_245_282_868_179_528
    assert len({int(hash_strings(pa.array(["a"]), seed)[0]) for seed in seeds}) == 8


@pytest.mark.parametrize(
    "column",
    [
        pa.chunked_array([["a", None], [], ["", "ü"]], pa.string()),
        pa.array(["a", None, "", "ü"], pa.large_string()),
        pa.array(["a", None, "", "ü"], pa.string_view()),
        pa.array(["a", None, "", "ü"]).dictionary_encode(),
        pa.array(["x", "a", None, "", "ü"])[1:],
    ],
)
def test_the_hash_does_not_depend_on_how_arrow_holds_strings(column: pa.Array | pa.ChunkedArray) -> None:
    hashes = hash_strings(column, 5)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == hash_strings(pa.array(["a", "\0null", "", "ü"]), 5).tolist()
    hashes ^= np.uint64(1)  # the caller's own


def test_no_strings() -> None:
    assert hash_strings(pa.chunked_array([], pa.string()), 0).tolist() == []
    assert len(set(hash_strings(pa.nulls(3, pa.string()), 0).tolist())) == 1


def test_positions_are_those_of_a_dict() -> None:
    rng = np.random.default_rng(0)
    ids = [f"image {n}" for n in rng.permutation(1_000)]
    index, order = index_of(ids)
    assert (len(index), index.repeats) == (1_000, 0)
    rows = {name: row for row, name in enumerate(ids)}
    wanted: list[str | None] = [f"image {n}" for n in rng.integers(0, 2_000, 5_000)]
    wanted[3] = None
    positions = index.positions(pa.chunked_array([wanted[:99], wanted[99:]], pa.string()))
    assert [order[at] if at != ABSENT else None for at in positions] == [rows.get(name) for name in wanted]  # type: ignore[arg-type]
    assert index.positions(pa.array(wanted, pa.string())).tolist() == positions.tolist()
    keys = hash_strings(pa.array(wanted, pa.string()), 7)
    assert index.positions_of(np.delete(keys, 3)).tolist() == np.delete(positions, 3).tolist()


def test_keys_at_the_ends_and_between() -> None:
    index = KeyIndex(np.array([2, 5, 2**64 - 1], np.uint64), 0)
    assert index.positions_of(np.array([0, 2, 3, 5, 9, 2**64 - 1], np.uint64)).tolist() == [-1, 0, -1, 1, -1, 2]
    assert index.where(np.array([True, False, True])).keys.tolist() == [2, 2**64 - 1]


def test_an_empty_index_holds_nothing() -> None:
    index, order = index_of([])
    assert (len(index), index.repeats, order.tolist()) == (0, 0, [])
    assert index.positions(pa.array(["a", None])).tolist() == [ABSENT, ABSENT]
    assert index_of(["a"])[0].positions(pa.array([], pa.string())).tolist() == []


def test_ids_that_stand_twice_are_counted() -> None:
    index, order = index_of(["a", "b", "a", "a"])
    assert index.repeats == 2
    assert sorted(order.tolist()) == [0, 1, 2, 3]


def test_a_null_is_absent_even_where_the_index_has_one() -> None:
    index, _ = KeyIndex.of(hash_strings(pa.array(["a", None]), 0), 0)
    assert index.positions(pa.array([None, "a"]))[0] == ABSENT
