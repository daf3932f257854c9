"""What all tests share: a tiny saved model, pictures made here, one Ray for the session."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
CLIPRAY = str(Path(sys.executable).parent / "clipray")

TINY_VIT = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved open_clip model of 64 px, as `local-dir:` name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny-model")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_VIT, "preprocess_cfg": {}}))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = open_clip.CLIP(**TINY_VIT)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 300 small JPEGs in three folders, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder, 300)
    return folder


def draw_pictures(folder: Path, count: int, *, start: int = 0) -> None:
    """Gradients with a coloured disc: cheap, different, and no two of the same file size by intent."""
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        height, width = (int(v) for v in rng.integers(48, 96, 2))
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        canvas = (np.stack([y, x, y * x], -1) * rng.integers(80, 255, 3)).astype(np.uint8)
        canvas[(y - rng.random()) ** 2 + (x - rng.random()) ** 2 < 0.05] = rng.integers(0, 255, 3)
        path = folder / f"class{number % 3}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas).save(path, quality=90)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photos; they are no part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip(f"real photos are not there: {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def ray_here() -> object:
    """One Ray of 4 logical CPUs for all tests that run in this process."""
    import logging

    from clipray.engine.connect import WORKER_ENV, _quiet_ray, _silent_stderr, ray

    _quiet_ray()
    with _silent_stderr():
        ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {**WORKER_ENV, "PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
        )
    yield ray
    ray.shutdown()


def write_job(
    path: Path, manifest: Path | str, model: str, *, output: Path | str | None = None, **settings: object
) -> str:
    """A job file with one `embed_images` step; `model` is a local-dir name. Returns its path."""
    import yaml

    job = {
        "output": str(output or path.parent / "out"),
        "model": {"name": model, "precision": settings.pop("precision", "fp32")},
        "steps": [{"embed_images": {"manifest": str(manifest), **settings}}],
    }
    path.write_text(yaml.safe_dump(job))
    return str(path)
