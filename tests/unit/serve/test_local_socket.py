"""Quick commands: a running server of the run answers over the user's own socket, as the command itself would."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from clipray.errors import JobError
from clipray.job import Model
from clipray.queries import label as label_module
from clipray.queries import search as search_module
from clipray.serve import app, local_client, quick
from clipray.serve.local_socket import LocalConnection, listening_socket, socket_path


@contextlib.contextmanager
def served(run: Path) -> Iterator[None]:
    """A server of the run on its local socket alone."""
    with listening_socket(str(run), pytest.fail) as listener:
        assert listener is not None
        server = uvicorn.Server(uvicorn.Config(app(str(run)), log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path: that of a socket has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="cr-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_a_server_answers_as_the_command_would(
    run: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    query: dict[str, Any] = {
        "image": [str(tmp_path / "red.png")],
        "where": "label = 'round'",
        "columns": ["width"],
        "top": 4,
    }
    here = quick.search(str(run), "a red square", **query)
    labels = list(quick.label([str(tmp_path / "red.png")], "red, blue", Model(name="demo"), template=None, top=2))
    with served(run):
        monkeypatch.setattr(search_module, "search", None)  # the command itself would call these
        monkeypatch.setattr(label_module, "label", None)
        there = quick.search(str(run), "a red square", **query)
        assert [hit.image_id for hit in there.hits] == [hit.image_id for hit in here.hits]
        assert [hit.score for hit in there.hits] == pytest.approx([hit.score for hit in here.hits], abs=0.01)  # bf16
        assert [hit.values for hit in there.hits] == [hit.values for hit in here.hits]
        assert (there.index, there.metric) == (here.index, here.metric)
        (look,) = quick.label([str(tmp_path / "red.png")], "red, blue", Model(name="demo"), template=None, top=2)
        assert [name for name, _ in look.labels] == [name for name, _ in labels[0].labels]
        assert look.image == str(tmp_path / "red.png")
        with pytest.raises(JobError, match="--like nowhere: index index has no such row"):
            quick.search(str(run), like=["nowhere"])
        assert local_client.ask_any_server("/local/label", {"model": {"name": "demo-rn"}}) is None
    assert not socket_path(str(run)).exists()


def test_another_version_and_another_run_are_not_asked(
    run: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(run):
        request = {"run": str(run), "text": None, "like": ["03.jpg"], "index": None, "by_region": False, "top": 1}
        assert local_client.ask_server_of(str(run), "/local/search", request)["hits"]
        assert local_client.ask_server_of(f"{run}-other", "/local/search", request) is None
        monkeypatch.setattr(local_client, "__version__", "0.0.0")
        assert local_client.ask_server_of(str(run), "/local/search", request) is None


def test_of_several_indexes_the_command_asks_which_one(run: Path, runtime: Path) -> None:
    several = run.parent / "several"
    shutil.copytree(run, several)
    shutil.copytree(several / "index", several / "other")
    with served(several), pytest.raises(JobError, match="there are several: index, other; choose one with --index"):
        quick.search(str(several), like=["03.jpg"], index=None)


def test_only_the_owner_may_connect(run: Path, runtime: Path) -> None:
    with listening_socket(str(run), print):
        path = socket_path(str(run))
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with listening_socket(str(run), print) as second:
            assert second is None  # the first one answers
        assert path.exists()
    path.parent.chmod(0o755)
    told: list[str] = []
    with listening_socket(str(run), told.append) as listener:
        assert listener is None
    assert "expected a folder of this user alone" in told[0]
    assert local_client.ask_server_of(str(run), "/local/search", {}) is None


def test_what_a_killed_server_left_is_replaced(run: Path, runtime: Path) -> None:
    path = socket_path(str(run))
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))  # nobody listens
    assert local_client.ask_server_of(str(run), "/local/search", {}) is None
    with served(run):
        connection = LocalConnection(path)
        connection.request("GET", "/api/status")
        assert json.loads(connection.getresponse().read())["runs"][0]["output"] == str(run)
        connection.close()


def test_the_port_has_no_local_addresses(client: Any, run: Path) -> None:
    answer = client.post("/local/search", content=json.dumps({"version": "0.1.0", "run": os.fspath(run)}))
    assert answer.status_code == 404
