"""Pickles of plain values, read without running anything of theirs.

A pickle is a program for a small stack machine, which may call any function by its name. This reader walks the operations
that the standard library's `pickletools` decodes, and knows only those that build dicts, lists, tuples, strings, bytes and
numbers, and NumPy arrays of numbers. No name is ever looked up: a call of anything but NumPy's own three is refused.
"""

from __future__ import annotations

import operator
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from clipray.errors import ManifestError

LITERALS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "BYTEARRAY8",
}  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
}  # fmt: skip
MADE: dict[str, Callable[[list[Any]], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}
ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
NAMES = {
    **{(module, name): name for module in ARRAYS for name in ("_reconstruct", "scalar")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "_frombuffer" for core in ("core", "_core")},
    ("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype", ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
}  # fmt: skip
"""Functions that a pickle of arrays calls, and what is done in their place."""
KINDS = "biuf"


class _Refused(Exception):
    """What it is that is not plain."""


@dataclass(frozen=True)
class _Name:
    """A function or class that the pickle names; nothing but its name."""

    name: str


@dataclass
class _Array:
    """A NumPy array whose content is still to come, as pickles have it."""

    values: np.ndarray | None = None


@dataclass
class _Kind:
    """A NumPy type; its byte order comes after its name."""

    name: str
    order: str = "|"

    def type(self) -> np.dtype[Any]:
        try:
            kind = np.dtype(self.name)
            kind = kind.newbyteorder(">") if self.order == ">" else kind
        except TypeError as error:
            raise _Refused(f"an array of {self.name!r}") from error
        if kind.kind not in KINDS or kind.shape or kind.names:
            raise _Refused(f"an array of {self.name!r}")
        return kind


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def above(self) -> list[Any]:
        """What lies above the last mark; the mark and that are taken away."""
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def take(self, n: int) -> list[Any]:
        if len(self.stack) < n:
            raise _Refused("operations without operands")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def do(self, name: str, argument: Any) -> None:
        """One operation, by the name that `pickletools` gives it."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in MADE:
            made = MADE[name](self.above())  # which puts another stack in place
            self.stack.append(made)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self.take(int(name[-1]))))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            self._fill(name)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._call(name, argument)

    def _fill(self, name: str) -> None:
        """Put items into a list or a dict."""
        one = {"APPEND": 1, "SETITEM": 2}
        items = self.take(one[name]) if name in one else self.above()
        if name.startswith("APPEND"):
            _of(list, self.stack[-1]).extend(items)
        else:
            _of(dict, self.stack[-1]).update(_pairs(items))

    def _call(self, name: str, argument: Any) -> None:
        if name == "GLOBAL":
            self.stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            self.stack.append(_named(*self.take(2)))
        elif name == "REDUCE":
            called, arguments = self.take(2)
            self.stack.append(_called(called, arguments))
        elif name == "BUILD":
            (state,) = self.take(1)
            _built(self.stack[-1], state)
        else:
            raise _Refused(f"the operation {name}")


def read_plain_pickle(data: bytes, where: str) -> Any:
    """The value of a pickle of plain values and NumPy arrays of numbers; `where` names it in errors.

    Raises:
        ManifestError: it is no pickle, is torn, or holds anything else, with what.
    """
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(data):
            machine.do(operation.name, argument)
        (value,) = machine.stack
        return _final(value, {})
    except _Refused as error:
        raise ManifestError(
            f"{where}: refused, since it holds {_one_line(error)}; only plain values and arrays of numbers are read from a pickle"
        ) from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{where}: not a whole pickle: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _named(module: Any, name: Any) -> _Name:
    if (module, name) not in NAMES:
        raise _Refused(f"the name {module}.{name}")
    return _Name(NAMES[module, name])


def _called(called: Any, arguments: Any) -> Any:
    """What a call of one of NAMES makes."""
    name = called.name if isinstance(called, _Name) else None
    if name == "_reconstruct" and arguments[0] == _Name("ndarray"):
        return _Array()
    if name == "_frombuffer":
        content, kind, shape, order = arguments
        return _Array(_filled(content, kind, shape, "F" if order == "F" else "C"))
    if name == "dtype":
        return _Kind(str(arguments[0]))
    if name == "encode" and arguments[1] in ("latin1", "latin-1"):
        return _of(str, arguments[0]).encode("latin-1")
    if name == "bytes" and arguments == ():  # empty ones, in old protocols
        return b""
    if name == "scalar" and isinstance(arguments[0], _Kind):
        return np.frombuffer(_bytes(arguments[1]), arguments[0].type())[0].item()
    raise _Refused("a call")


def _built(value: Any, state: Any) -> None:
    """Give an array its content, or a type its byte order."""
    if isinstance(value, _Kind):
        value.order = str(_of(tuple, state)[1])
    elif isinstance(value, _Array):
        _, shape, kind, columns_first, content = state
        value.values = _filled(content, kind, shape, "F" if columns_first else "C")
    else:
        raise _Refused("an object with a state")


def _filled(content: Any, kind: Any, shape: Any, order: Literal["C", "F"]) -> np.ndarray:
    values = np.frombuffer(_bytes(content), _of(_Kind, kind).type())
    return values.reshape([operator.index(n) for n in shape], order=order)


def _bytes(value: Any) -> bytes:
    """Bytes; Python 2 wrote them as a string."""
    return value.encode("latin-1") if isinstance(value, str) else bytes(_of((bytes, bytearray), value))


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"a {type(value).__name__.strip('_').lower()} in a place where none should be")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _final(value: Any, done: dict[int, Any]) -> Any:
    """With arrays in place of what stood for them. done: of values that stand in several places, by `id`."""
    if isinstance(value, _Name | _Kind) or (isinstance(value, _Array) and value.values is None):
        raise _Refused("a name as a value")
    if isinstance(value, _Array):
        return value.values
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        done[id(value)] = None  # of what holds itself
        if isinstance(value, dict):
            done[id(value)] = {key: _final(item, done) for key, item in value.items()}
        else:
            done[id(value)] = type(value)([_final(item, done) for item in value])
    return done[id(value)]
