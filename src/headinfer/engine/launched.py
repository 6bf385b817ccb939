"""Attention whose calls of kernels are launches of a capture: done now, and in each replay.

A total lives for one replay. A GPU's kernels are recorded when they are called, and a simulated
device calls them again; both find the total that the same replay began.
"""

import dataclasses

import torch

from headinfer.attend.partial import Partial
from headinfer.attend.table import Kernels
from headinfer.attend.work import Total, Work
from headinfer.device.base import Device


class LaunchedTotal:
    """A total that each replay makes anew.

    Args:
        device: launches.
        kernels: make it.
        query: of the works into it.
        scale: factor of the scores.

    Attributes:
        folded: never looked at: the total of a replay has its own.
    """

    folded: torch.Tensor | None = None
    now: Total

    def __init__(self, device: Device, kernels: Kernels, query: torch.Tensor, scale: float) -> None:
        self._device = device

        def begin() -> None:
            self.now = kernels.begin(query, scale=scale)

        device.launch(begin)

    def add(self, partial: Partial) -> None:
        """Merge a partial."""
        self._device.launch(lambda: self.now.add(partial))

    def alone(self, dtype: torch.dtype) -> None:
        """Return None: what there is, only a replay knows."""

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Merge attention sinks."""
        self._device.launch(lambda: self.now.add_sinks(sinks))

    def write(self, out: torch.Tensor) -> None:
        """Write the result."""
        self._device.launch(lambda: self.now.write(out))


class LaunchedKernels(Kernels):
    """A table of kernels that are launched, and read from memory how many tokens a tile has.

    Args:
        kernels: what serves.
        device: launches.
    """

    def __init__(self, kernels: Kernels, device: Device) -> None:
        super().__init__(kernels.kernels)
        self._table, self._device = kernels, device

    def begin(self, query: torch.Tensor, *, scale: float) -> Total:
        """Return what collects the partials of some queries in each replay."""
        return LaunchedTotal(self._device, self._table, query, scale)

    def pick(self, work: Work) -> "LaunchedKernels":
        """Return this table, which picks when it is launched."""
        return self

    name = "launched"

    def serves(self, work: Work) -> bool:
        """Return True; see `pick`."""
        return True

    def square(self, _work: Work) -> None:
        """Return None: all is launched."""

    def attend(self, work: Work) -> None:
        """Launch the attention of a work's one tile."""
        total, table = work.into, self._table
        assert isinstance(total, LaunchedTotal)
        (tile,) = work.tiles

        def launch() -> None:
            asked = dataclasses.replace(work, into=total.now)
            if tile.counted is not None:
                table.attend_counted(asked)
            else:
                table.pick(asked).attend(asked)

        self._device.launch(launch)
