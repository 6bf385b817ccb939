"""A simulated device whose host functions run as late as a GPU's may."""

from headinfer.device.base import Edge
from headinfer.device.hazards import AccessLog
from headinfer.device.simulated import SimulatedDevice


class Unchecked(AccessLog):
    """Takes any access for ordered."""

    def add(self, *_access: object) -> None:
        """Accept."""


class HeldDevice(SimulatedDevice):
    """Runs host functions as a GPU does: compute waits for them, but its caller does not.

    The simulation's compute runs at once, and so would run them too. Here its wait is left out,
    with the check that would notice; what compute makes of the answer is then garbage.
    """

    def __init__(self) -> None:
        super().__init__(skip=[Edge.ANSWERED])
        self.memory.log = Unchecked()

    def run_some(self) -> None:
        """Run nothing that nobody waits for."""

    def finish_compute(self) -> None:
        """Run what compute would have waited for."""
        self.synchronize()
