"""Fingerprints of default settings stay what they were, so that finished tables stay finished when settings are added."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from clipray.job import STEPS, Settings
from clipray.job.base import added_later
from clipray.job.load import fingerprint

MANIFEST, VECTORS = {"manifest": "m.parquet"}, {"input": "images.clip"}
# The least that each step needs, and the fingerprint of its settings before any was `added_later`.
OF_BEFORE: dict[str, tuple[dict[str, Any], str]] = {
    "embed_images": (MANIFEST, "4b25af515561fed0"),
    "embed_regions": (MANIFEST, "a5d6edf300c27e7d"),
    "render_depth": (MANIFEST, "1ad82dee457004a5"),
    "embed_texts": (MANIFEST, "90a7e1015aa59c0e"),
    "reduce": ({**VECTORS, "components": 2}, "12d8897fc6753d83"),
    "cluster": ({**VECTORS, "clusters": 2}, "b46ed71f0985423e"),
    "deduplicate": ({**VECTORS, "clusters": "clusters"}, "970d4006be4dde6a"),
    "index": (VECTORS, "c95d4328bd431969"),
    "project": (VECTORS, "304e8e9807677a1d"),
    "augment": ({**VECTORS, "index": "index"}, "471733e89c82c071"),
    "search": ({"index": "index", "queries": "texts.embedding"}, "da9ec1b0c98c400f"),
    "evaluate_retrieval": ({**VECTORS, "ground_truth": "q.parquet"}, "1c86c6afa41a9511"),
    "label": ({**VECTORS, "classes": ["a", "b"]}, "144b2b0be440ec69"),
    "probe": ({**VECTORS, "truth": "images.label"}, "b7e8d42a42df6734"),
    "evaluate_labels": ({"labels": "labels", "truth": "images.label"}, "f0182d34c82f83d3"),
    "score_captions": ({**MANIFEST, **VECTORS}, "d959137e5f488715"),
    "refer": ({"input": "regions.clip"}, "fa502a4068ee0b2a"),
    "attack": ({**MANIFEST, "classes": ["a", "b"]}, "506fe069c4ee7c36"),
    "report": ({}, "edc3e82cc4883a51"),
}


def test_every_step_is_known_to_these_tests() -> None:
    assert OF_BEFORE.keys() == STEPS.keys()


@pytest.mark.parametrize("step", OF_BEFORE)
def test_default_settings_have_the_fingerprint_of_before(step: str) -> None:
    least, before = OF_BEFORE[step]
    assert fingerprint(STEPS[step](**least).identity()) == before


class Inner(Settings):
    old: int = 1
    new: str = added_later("as before")


class Outer(Settings):
    inner: Inner = Field(default_factory=Inner)
    new: list[int] | None = added_later(None, min_length=1)


def test_what_was_added_later_counts_where_it_is_set() -> None:
    assert Outer().identity() == Outer(inner=Inner(new="as before"), new=None).identity() == {"inner": {"old": 1}}
    assert Outer(inner=Inner(new="other"), new=[1]).identity() == {"inner": {"old": 1, "new": "other"}, "new": [1]}
