"""Measuring this machine: `timing` times, `operations` and `attention` are timed, `run` does all.

Importing this package does not import torch.
"""

from headinfer.device.identity import identity

__all__ = ["identity"]
