"""What all tests share: a tiny saved model, pictures made here, one Ray for the session."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import PHOTOS, PYTHONPATH, TINY_VIT, ForkedWorkers, ObjectStore, clipray_here, draw_pictures

OWN_RAYS = ("test_kill", "test_nodes", "test_submit")
"""Files whose tests start Rays of their own: one at a time, and first, for two at once overload two cores."""

SHARED = {"test_demo_command": "demo", "test_browser": "demo"}
"""Files that stay in one process, for they share what is made once in it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in OWN_RAYS)
    for item in items:
        if "ray_here" in getattr(item, "fixturenames", ()):  # also through other fixtures
            item.add_marker("ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file stay in one process, and so do those of all files of OWN_RAYS, and those of SHARED."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "own_rays" if Path(file).stem in OWN_RAYS else SHARED.get(Path(file).stem, file)

    return ByFile(config, log)


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


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photos; they are no part of the project."""
    if not PHOTOS.is_dir():
        pytest.skip(f"real photos are not there: {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """An S3 server of this process, found by environment variables; it can be told to fail."""
    store = ObjectStore()
    before = {name: os.environ.get(name) for name in store.environment}
    os.environ.update(store.environment)
    try:
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield store
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        store.stop()


@pytest.fixture
def s3(object_store: ObjectStore) -> str:
    """`s3://bucket`, which the tests of a process share."""
    return "s3://bucket"


@pytest.fixture(scope="session")
def forked_workers() -> Iterator[ForkedWorkers]:
    """Within `with forked_workers():`, a Ray that starts has workers that are forked, all from one process.

    They know the filesystems of `lib/testfs.py`.
    """
    from clipray.engine.connect import WORKER_ENV
    from clipray.engine.fork_server import MODELS, VECTORS, forking_python

    environment = {**WORKER_ENV, "PYTHONPATH": PYTHONPATH}

    @contextlib.contextmanager
    def forking() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", python)  # by which Ray starts its workers
            for name, value in environment.items():
                patch.setenv(name, value)
            yield

    with forking_python({**os.environ, **environment}, (*MODELS, *VECTORS, "sklearn.cluster")) as python:
        yield forking


@pytest.fixture(scope="session")
def ray_here(forked_workers: ForkedWorkers, object_store: ObjectStore) -> Iterator[object]:
    """One Ray of 4 logical CPUs for all tests that run in this process; its workers know the server of `object_store`."""
    import logging

    from clipray.engine.connect import _quiet_ray, _silent_stderr, ray
    from clipray.engine.ray_internals import quiet_raylet, without_driver_path, without_helpers

    _quiet_ray()
    options = {"num_cpus": 4, "include_dashboard": False}
    with forked_workers(), _silent_stderr(), without_helpers(), without_driver_path(options) as safe_options:
        ray.init("local", **safe_options, log_to_driver=False, logging_level=logging.ERROR)
    with quiet_raylet():
        yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory, ray_here: object) -> tuple[Path, str]:
    """`clipray demo`, run once in this process: the folder that it ran in, and what it printed."""
    home = tmp_path_factory.mktemp("demo")
    return home, clipray_here(["demo"], home)
