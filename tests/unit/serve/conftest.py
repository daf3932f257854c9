"""A small finished run with an index, served to a client of this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support import ROOT

from clipray.serve import app


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run of 12 images, their labels and clusters, by the model `demo`."""
    folder = tmp_path_factory.mktemp("served") / "before"
    shutil.copytree(ROOT / "tests" / "data" / "run-34d5816" / "run", folder)
    return folder


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with TestClient(app(str(run)), base_url="http://localhost", raise_server_exceptions=True) as client:
        yield client
