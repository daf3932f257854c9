"""docs/search.md runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import DOCS, follow

from clipray import tables


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("search")
    return home, follow((DOCS / "search.md").read_text(encoding="utf-8"), home)


def test_the_page_searches_with_words_a_picture_and_a_region(followed: tuple[Path, str]) -> None:
    home, printed = followed
    assert printed.count("│ 1 ") == 4
    assert "single-00003#g2" not in printed  # not its own answer
    page = (home / "answers.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 12
    assert page.index("single-00003") < page.index("2. ")


def test_the_page_makes_a_table_of_neighbours(followed: tuple[Path, str]) -> None:
    found = tables.read_table(str(followed[0] / "runs/search/neighbours")).to_pandas()
    assert (found["query_id"] != found["image_id"]).all()
    assert found.groupby("query_id").size().eq(5).all()
