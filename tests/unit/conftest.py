"""What the unit tests share: saved models of three kinds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": TEXT,
    },
    "resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": TEXT,
    },
    "timm": {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "test_convnext",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "mlp",
            "image_size": 64,
        },
        "text_cfg": TEXT,
    },
}
"""Small open_clip configurations: a ViT, a ModifiedResNet, a timm tower."""

# Of each, another way to say how pictures are prepared.
PREPROCESS: dict[str, dict[str, Any]] = {
    "vit": {},
    "resnet": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"},
    "timm": {"resize_mode": "squash"},
}


@pytest.fixture(autouse=True)
def _ray_starts_by_its_fixture(request: pytest.FixtureRequest) -> Iterator[None]:
    """So that tests with Ray have their marker, and `make check` leaves them out."""

    def is_up() -> bool:
        return "ray" in sys.modules and sys.modules["ray"].is_initialized()

    before = is_up()
    yield
    assert is_up() == before or request.node.get_closest_marker("ray")


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> folder with `open_clip_config.json` and `open_clip_model.safetensors`; the weights are seeded."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folders = {}
    for kind, config in MODELS.items():
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        values = {"model_cfg": config, "preprocess_cfg": PREPROCESS[kind]}
        (folder / "open_clip_config.json").write_text(json.dumps(values))
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = open_clip.CLIP(**config)
            _settle(network.visual)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folders


def _settle(visual: Any) -> None:
    """Batch norms of a fresh network let activations grow without bound: give them the statistics of noise."""
    import torch

    visual.train()
    with torch.inference_mode():
        for _ in range(20):
            visual(torch.randn(8, 3, 64, 64))
    visual.eval()
