"""Pickles of plain values and NumPy arrays of numbers, read by the standard library with an allowlist of names.

A pickle may call any function by its name. Here the names that a pickle of arrays holds stand for the functions below, any
other name is refused, and no module is ever imported for a pickle.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from clipray.errors import ManifestError, one_line

REFUSED_OPERATIONS = {"PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "EMPTY_SET", "FROZENSET", "NEXT_BUFFER"}
MEMO_OPERATIONS = {"PUT", "BINPUT", "LONG_BINPUT"}
BROKEN = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError
)  # fmt: skip


def read_plain_pickle(data: bytes, where: str) -> Any:
    """The value of a pickle of plain values and NumPy arrays of numbers; `where` names it in errors.

    Raises:
        ManifestError: it is no pickle, is torn, or holds anything else, with what.
    """
    try:
        _check_operations(data)
        return _Unpickler(io.BytesIO(data), encoding="latin1").load()  # as Python 2 wrote bytes
    except _Refused as error:
        raise ManifestError(
            f"{where}: refused, since it holds {one_line(error)}; only plain values and arrays of numbers are read from a pickle"
        ) from error
    except BROKEN as error:
        raise ManifestError(f"{where}: not a whole pickle: {one_line(error)}") from error


class _Refused(Exception):
    """What it is that is not plain."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _StandIn(STAND_INS[module.replace("numpy.core.", "numpy._core."), name])
        except KeyError:
            raise _Refused(f"the name {module}.{name}") from None


class _StandIn:
    """What a name stands for: it can be called, but a pickle cannot change it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a function with a state")


class _NumberType:
    """NumPy's `dtype`, of numbers only; its byte order comes after its name."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"[biuf]\d{1,2}", str(name)):
            raise _Refused(f"an array of {name!r}")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose content comes after it; as long as its bytes, whatever shape the pickle claims."""

    def __setstate__(self, state: Any) -> None:
        _, shape, number_type, columns_first, content = state
        values = _from_buffer(content, number_type, shape, "F" if columns_first else "C")
        super().__setstate__((1, values.shape, values.dtype, bool(columns_first), values.tobytes("A")))  # type: ignore[arg-type] # its stubs want a numpy.bool


def _from_buffer(content: Any, number_type: _NumberType, shape: Any, order: Any) -> np.ndarray:
    content = content.encode("latin1") if isinstance(content, str) else content  # by Python 2
    return np.frombuffer(content, number_type.dtype).reshape(shape, order=order)


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): lambda: None,  # `_reconstruct` names it, nothing calls it
    ("numpy", "dtype"): _NumberType,
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(0),
    ("numpy._core.multiarray", "scalar"): lambda number_type, content: _from_buffer(content, number_type, 1, "C")[0].item(),
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes of old protocols
    ("__builtin__", "bytes"): lambda: b"",
}  # fmt: skip


def _check_operations(data: bytes) -> None:
    """Refuses operations that are not for plain values, and lengths and places in the memo beyond the file's own size."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in REFUSED_OPERATIONS:
            raise _Refused(f"the operation {operation.name}")
        if operation.name in MEMO_OPERATIONS and int(argument or 0) > len(data):
            raise ValueError(f"memo entry {argument} in {len(data)} bytes")
