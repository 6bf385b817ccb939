"""Host memory that is got ahead of need, while its owner does something else."""

from typing import Protocol

import torch


class HostMemory(Protocol):
    """A piece of host memory on its way."""

    def result(self) -> torch.Tensor:
        """Block the host until it is there, and return it as `Device.host_empty` does.

        Raises:
            MemoryPlanError: it cannot be had.
        """

    def cancel(self) -> object:
        """Say that nobody will take it: it is freed again, or not even got."""

    def done(self) -> bool:
        """Whether it is there, or cannot be had."""


class ReadyMemory:
    """A piece of host memory that is there; see `HostMemory`.

    Args:
        memory: the piece.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory

    def result(self) -> torch.Tensor:
        """Return it."""
        return self._memory

    def cancel(self) -> None:
        """Do nothing: it is freed with its last view."""

    def done(self) -> bool:
        """Whether it is there: always."""
        return True
