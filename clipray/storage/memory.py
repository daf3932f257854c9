"""Freed memory goes back to the system: allocators keep it, and a process that waits would hold it for nothing."""

from __future__ import annotations

import contextlib
import ctypes

import pyarrow as pa


def give_back() -> None:
    """Let Arrow and the C library return what is free, where they can."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # `malloc_trim` is there in glibc
        ctypes.CDLL(None).malloc_trim(0)
