"""Digests of the files that come in: by content, and by what versions before knew of them."""

from __future__ import annotations

import json

from clipray.tables.digests import (
    Digest,
    combined,
    digest_of,
    file_version,
    files_digest,
    is_same_file,
    plain,
    without_hashes,
)

BEFORE = [{"name": "a.parquet", "rows": 3, "bytes": 700}, {"name": "b.parquet", "rows": 4, "bytes": 800}]
HASHED = [{**file, "sha256": letter * 64} for file, letter in zip(BEFORE, "01", strict=True)]
OTHER = [HASHED[0], {**HASHED[1], "sha256": "2" * 64}]


def test_the_form_of_before_is_what_versions_before_wrote() -> None:
    expected = digest_of([["a.parquet", 3, 700], ["b.parquet", 4, 800]])
    assert files_digest(BEFORE) == Digest(expected)
    assert files_digest(HASHED).before == expected
    assert without_hashes(HASHED) == BEFORE


def test_what_was_finished_before_stays_so_when_hashes_come() -> None:
    stored = str(files_digest(BEFORE).like(None))
    assert files_digest(HASHED).is_that(stored)
    assert files_digest(HASHED).like(stored) == stored


def test_other_content_of_the_same_size_is_another_digest() -> None:
    stored = files_digest(HASHED).like(None)
    assert stored.startswith("sha256:")
    assert files_digest(HASHED).is_that(stored)
    assert not files_digest(OTHER).is_that(stored)
    assert not files_digest(BEFORE).is_that(stored)


def test_a_file_without_a_hash_leaves_the_form_of_before() -> None:
    assert files_digest([HASHED[0], BEFORE[1]]) == files_digest(BEFORE)


def test_several_inputs_are_by_content_when_all_are() -> None:
    old, new, text = files_digest(BEFORE), files_digest(HASHED), plain("0123")
    assert combined([old, None, text]).before == digest_of([old.before, None, "0123"])
    assert combined([new, None, text]).is_that(combined([old, None, text]).like(None))
    assert combined([old, new]).content == ""
    stored = combined([new, "0123"]).like(None)
    assert stored.startswith("sha256:")
    assert not combined([files_digest(OTHER), "0123"]).is_that(stored)
    assert combined([HASHED]).before == digest_of([BEFORE])
    assert combined([HASHED]).content == combined([new]).content


def test_a_file_that_an_index_holds() -> None:
    old, new = json.dumps(("a.parquet", 3, 700)), json.dumps(("a.parquet", 3, 700, "00"))
    assert [file_version(BEFORE[0]), file_version({**BEFORE[0], "sha256": "00"})] == [
        tuple(json.loads(s)) for s in (old, new)
    ]
    assert is_same_file(old, old)
    assert is_same_file(old, new)
    assert is_same_file(new, new)
    assert not is_same_file(new, old)
    assert not is_same_file(new, json.dumps(("a.parquet", 3, 700, "01")))
    assert not is_same_file(old, json.dumps(("a.parquet", 3, 701, "00")))
    assert not is_same_file(old, None)
