"""Ready-made jobs: each is valid, and what its comments say to edit fits the models that they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT

from clipray.job.load import load_job, parse_job, steps_of
from clipray.models.layers import refusal, tower_without_weights
from clipray.models.resolve import architecture

JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
RESNET = {"first_layer": ("conv1", "stem"), "whole_network": ("tokens", "layer4")}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_is_valid(path: Path) -> None:
    assert load_job(path).steps


@pytest.mark.parametrize("name", RESNET)
@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_experiments_name_layers_of_both_networks(name: str, model: str) -> None:
    text = (ROOT / "jobs" / f"{name}.yaml").read_text(encoding="utf-8")
    if model == "RN50":
        vit, resnet = RESNET[name]
        assert text.count(f"# RN50: layer: {resnet}") == text.count(f"layer: {vit},") == 2
        text = text.replace(f"layer: {vit},", f"layer: {resnet},").replace("name: ViT-B-32,", "name: RN50,", 1)
    job = parse_job(text)
    assert job.model is not None
    found = architecture(job.model.name)
    (step,) = steps_of(job)
    features = step.features  # type: ignore[union-attr]
    assert job.model.name == model
    assert {feature.pooling for feature in features.values()} >= {"mac", "rmac"}
    layers = [feature.layer for feature in features.values()]
    assert refusal(tower_without_weights(found), layers, found.image_size) is None
