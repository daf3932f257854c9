"""open_clip, imported in half the time."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def import_open_clip() -> None:
    """Import open_clip without torch's compiler; what comes after finds it imported.

    torchvision and timm ask torch._dynamo for two functions while they are imported, which brings in sympy and all of
    inductor: 1.4 s of a core, in every process that encodes, for what is never used there. So they get stand-ins. The
    compiler itself is imported when somebody asks for it.
    """
    if "open_clip" in sys.modules or "torch._dynamo" in sys.modules:
        return
    importlib.import_module("torch")
    package, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    package.__path__ = []
    package.disable = _as_it_is  # type: ignore[attr-defined]
    utils.is_compile_supported = lambda device: False  # type: ignore[attr-defined] # noqa: ARG005
    sys.modules |= {package.__name__: package, utils.__name__: utils}
    try:
        importlib.import_module("open_clip")
    finally:
        for name in (package.__name__, utils.__name__):
            del sys.modules[name]


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """`torch._dynamo.disable` where nothing is compiled."""
    return function if function is not None else _as_it_is
