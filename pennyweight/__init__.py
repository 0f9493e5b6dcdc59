"""Pennyweight: from a large language model to a small, low-bit one, with the proof beside it.

    import pennyweight

    summary = pennyweight.run(out="runs/quickstart")
    pennyweight.evaluate_model("runs/quickstart/student-int4", tasks=["basic_arithmetic"])

What is named here is loaded when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pennyweight.version import __version__

if TYPE_CHECKING:
    from pennyweight.api import distill, run
    from pennyweight.commands import Chat, compare, evaluate_model, show, verify
    from pennyweight.errors import PennyweightError
    from pennyweight.quantizing import quantize

__all__ = [
    "Chat",
    "PennyweightError",
    "__version__",
    "compare",
    "distill",
    "evaluate_model",
    "quantize",
    "run",
    "show",
    "verify",
]

_HOMES = {"run": "api", "distill": "api", "PennyweightError": "errors", "quantize": "quantizing"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pennyweight' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pennyweight.{_HOMES.get(name, 'commands')}"), name)
