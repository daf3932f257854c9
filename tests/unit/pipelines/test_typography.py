"""Words on pictures: which word, where it stands, and that it stays on the picture."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from clipray.job import Lettering
from clipray.pipelines.attack import PLACES, place_of, write_word, wrong_label

GREY, WHITE, BLACK = (128, 128, 128), (255, 255, 255), (0, 0, 0)


def canvas(height: int = 120, width: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def changed(image: Image.Image) -> tuple[slice, slice]:
    """Rows and columns of a canvas in which something was written."""
    different = (np.asarray(image) != GREY[0]).any(axis=2)
    rows, columns = np.flatnonzero(different.any(axis=1)), np.flatnonzero(different.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def test_the_word_is_wrong_and_any_other_is_as_likely() -> None:
    found = Counter(wrong_label(f"picture {n}", 2, 5, seed=0) for n in range(4_000))
    assert found.keys() == {0, 1, 3, 4}
    assert all(880 < count < 1_120 for count in found.values())  # 1,000 expected, four standard deviations
    assert {wrong_label("a", label, 2, 7) for label in (0, 1)} == {0, 1}
    assert wrong_label("a", 0, 2, 7) == 1


def test_the_same_picture_and_seed_give_the_same_word_and_place() -> None:
    ids = [f"p{n}" for n in range(50)]
    words = [[wrong_label(i, 0, 100, seed) for i in ids] for seed in (0, 0, 1)]
    assert words[0] == words[1]
    assert sum(a == b for a, b in zip(words[0], words[2], strict=True)) < 10
    places = [place_of(i, Lettering(), 0) for i in ids]
    assert places == [place_of(i, Lettering(), 0) for i in ids]
    assert len(set(places)) == 50
    assert all(0 <= share < 1 for place in places for share in place)
    assert place_of("p1", Lettering(place="bottom"), 0) == (1, 0.5)


@pytest.mark.parametrize("place", PLACES)
def test_a_plate_lies_where_it_should(place: str) -> None:
    before = canvas()
    after = write_word(before, "dog", PLACES[place], Lettering(size=0.2))
    assert (np.asarray(before) == GREY[0]).all()  # the picture itself is not touched
    rows, columns = changed(after)
    up, down, left, right = rows.start, 120 - rows.stop, columns.start, 200 - columns.stop
    above, beside = PLACES[place]
    assert abs(up - above * (up + down)) <= 1.5
    assert abs(left - beside * (left + right)) <= 1.5
    assert 0.2 * 120 * 0.7 < rows.stop - rows.start < 0.2 * 120 * 2
    found = {tuple(c) for c in np.asarray(after)[rows, columns].reshape(-1, 3).tolist()}
    assert {BLACK, WHITE} <= found
    assert np.asarray(after)[rows, columns].min(axis=2).mean() > 140  # more plate than ink


@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 40), (20, 300)])
def test_a_long_name_stays_on_the_picture(size: float, height: int, width: int) -> None:
    after = write_word(canvas(height, width), "great grey shrike of the north", (0.5, 0.5), Lettering(size=size))
    rows, columns = changed(after)
    edge = np.asarray(after)[[rows.start, rows.stop - 1], columns.start]
    assert edge.min() > 200  # corners of the plate: it ends on the picture
    ink = np.asarray(after).max(axis=2) < 90
    assert ink.any() or size * min(height, width) < 10  # letters of a few px are grey
    assert not ink[[0, -1]].any()
    assert not ink[:, [0, -1]].any()


def test_without_a_plate_only_letters_are_drawn() -> None:
    after = np.asarray(write_word(canvas(), "dog", (0.5, 0.5), Lettering(size=0.3, colour="#ff0000", plate=None)))
    rows, columns = changed(Image.fromarray(after))
    share = (after[rows, columns] != GREY[0]).any(axis=2).mean()
    assert 0.15 < share < 0.75
    assert (after == (255, 0, 0)).all(axis=2).any()
    assert not (after == WHITE).all(axis=2).any()


def test_settings_that_are_none() -> None:
    for wrong in ({"colour": "grue"}, {"plate": "#12"}, {"size": 0}, {"size": 1.5}, {"place": "inside"}):
        with pytest.raises(ValidationError):
            Lettering(**wrong)  # type: ignore[arg-type]
