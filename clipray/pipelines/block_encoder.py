"""An encoder that a worker starts, and the threads that run it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from clipray.pipelines.spec import EncodeSettings, TextSettings

Encoder = TypeVar("Encoder")


def start_encoder(
    make: Callable[..., Encoder], settings: EncodeSettings | TextSettings, **more: Any
) -> tuple[ThreadPoolExecutor, Encoder]:
    """An encoder of `settings.model` as a worker is told to use it, and the threads that made it and are to run it.

    They share out torch's own threads among `settings.at_once` batches.
    """
    each = max(1, settings.threads // settings.at_once)
    threads = ThreadPoolExecutor(settings.at_once, "encode", initializer=torch.set_num_threads, initargs=(each,))
    encoder = threads.submit(
        make,
        settings.model,
        precision=settings.precision,
        device=settings.device,
        batch_size=settings.batch_size,
        normalize=settings.normalize,
        **more,
    )
    return threads, encoder.result()
