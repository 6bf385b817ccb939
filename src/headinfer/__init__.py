"""Exact inference over contexts far larger than the GPU's memory (HeadInfer, arXiv 2502.12574).

The KV cache lives in host memory, attention head by attention head, and only the part now being
attended is on the device. Importing this package changes nothing; `attach` does.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from headinfer.errors import HeadInferError

if TYPE_CHECKING:
    from headinfer.api import attach, detach
    from headinfer.engine.stats import Stats
    from headinfer.generation.stream import generate
    from headinfer.offload import Offload
    from headinfer.plan.plan import Plan

try:
    __version__ = version("headinfer")
except PackageNotFoundError:  # running from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "HeadInferError",
    "Offload",
    "Plan",
    "Stats",
    "__version__",
    "attach",
    "detach",
    "generate",
]


_HOMES = {
    "Offload": "headinfer.offload",
    "Plan": "headinfer.plan.plan",
    "Stats": "headinfer.engine.stats",
    "attach": "headinfer.api",
    "detach": "headinfer.api",
    "generate": "headinfer.generation.stream",
}
"""The modules of public names that are imported when they are asked for."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `headinfer --help` takes no seconds."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those not imported yet included."""
    return sorted({*globals(), *__all__})
