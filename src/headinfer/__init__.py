"""Exact inference over contexts far larger than the GPU's memory (HeadInfer, arXiv 2502.12574).

The KV cache lives in host memory, attention head by attention head, and only the part now being
attended is on the device. Importing this package changes nothing; `attach` does.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from headinfer.engine.stats import Stats
from headinfer.errors import HeadInferError
from headinfer.plan.plan import Plan

if TYPE_CHECKING:
    from headinfer.api import attach, detach
    from headinfer.generation.stream import generate
    from headinfer.offload import Offload

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


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for: `headinfer --help` takes no seconds."""
    if name in ("Offload", "attach", "detach"):
        from headinfer import api

        return getattr(api, name)
    if name == "generate":
        from headinfer.generation.stream import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, those not imported yet included."""
    return sorted({*globals(), *__all__})
