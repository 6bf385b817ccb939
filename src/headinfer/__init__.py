"""Exact inference over contexts far larger than the GPU's memory (HeadInfer, arXiv 2502.12574).

The KV cache lives in host memory, attention head by attention head, and only the part now being
attended is on the device. Importing this package changes nothing; `attach` does.
"""

from importlib.metadata import PackageNotFoundError, version

from headinfer.api import Offload, attach
from headinfer.engine.stats import Stats
from headinfer.errors import HeadInferError
from headinfer.plan.plan import Plan

try:
    __version__ = version("headinfer")
except PackageNotFoundError:  # running from a source tree that was not installed
    __version__ = "0+unknown"

__all__ = ["HeadInferError", "Offload", "Plan", "Stats", "__version__", "attach"]
