"""Files of weights: where they come from, and their hashes. Imports no torch, so that the driver needs none."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from clipray.errors import ModelError, one_line
from clipray.storage.folder import absolute
from clipray.storage.uris import is_local

SUFFIXES = (".safetensors", ".bin", ".pth")  # of weights in a model's folder


def sha256(path: str) -> str:
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def folder_weights(folder: Path) -> list[Path]:
    """The weights in a model's folder. Raises ModelError: there are none."""
    weights = sorted(p for p in folder.glob("*") if p.suffix in SUFFIXES)
    if not weights:
        raise ModelError(f"model.name: {folder}: no weights (*.safetensors, *.bin, *.pth) beside the config")
    return weights


def folder_sha256(folder: Path, config: str) -> str:
    """Of the file `config` and all weights in a model's folder. Raises ModelError: there are no weights."""
    parts = [sha256(str(p)) for p in [folder / config, *folder_weights(folder)]]
    return "sha256:" + hashlib.sha256("".join(parts).encode()).hexdigest()


def fetched(url: str) -> str:
    """The path of a checkpoint's copy on this machine. Raises ModelError: it could not be downloaded."""
    cache = os.path.expanduser("~/.cache/clipray")
    return downloaded(url, lambda: fsspec.open_local(f"filecache::{url}", filecache={"cache_storage": cache}))


def checkpoint_path(pretrained: str) -> str | None:
    """The path of a checkpoint, a copy of it where it is no local file; None where there is no such file.

    Raises:
        ModelError: it could not be downloaded.
    """
    if not is_local(pretrained):
        return fetched(pretrained)
    path = absolute(pretrained)
    return path if os.path.isfile(path) else None


def downloaded(what: str, download: Callable[[], Any]) -> str:
    """The path that `download` returns. Raises ModelError: it failed; `what` names the weights."""
    try:
        with quiet():
            path = download()
    except Exception as error:  # hubs and filesystems each have their own
        reason = one_line(error) or type(error).__name__
        raise ModelError(
            f"the weights of {what} are not on this machine and could not be downloaded ({reason}); give a checkpoint's path instead"
        ) from error
    return str(path)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs on the root logger and warns of what `resolve` has checked already; the hub retries for a minute."""
    from huggingface_hub import constants

    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub", "transformers")}
    offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline or not _hub_answers(constants.ENDPOINT)
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@functools.cache
def _hub_answers(endpoint: str) -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
        return True
    except OSError:
        return False
