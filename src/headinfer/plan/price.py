"""The price of a schedule's steps: the bytes they move, and the copies and kernels they start."""

from dataclasses import dataclass

from headinfer.schedule.steps import Ask, Attend, Fetch, SendHome, Step, Tiles


@dataclass(slots=True)
class Price:
    """A sum of what the steps of a pass move and start.

    Attributes:
        batch: rows.
        fetched_bytes: that cross the link to the device.
        sent_bytes: that cross it back.
        asked_bytes: that the host attends.
        attended: calls of a kernel.
        copies: transfers to the device.
    """

    batch: int
    fetched_bytes: float = 0.0
    sent_bytes: float = 0.0
    asked_bytes: float = 0.0
    attended: int = 0
    copies: int = 0

    def add(self, step: Step, token_bytes: float, layers: int, kv_heads: int) -> None:
        """Add a step that some layers, alike, perform.

        Args:
            step: the step.
            token_bytes: of one token in all rows of these layers.
            layers: their number.
            kv_heads: of each.
        """
        if isinstance(step, Fetch):
            self.fetched_bytes += (step.end - step.start) * token_bytes
            # Keys and values; rows are apart where a tile has some, but not all, of the heads.
            rows = self.batch if 1 < step.heads < kv_heads else 1
            self.copies += 2 * step.tiles * rows * layers
            self.attended += step.tiles * layers
        elif isinstance(step, Ask):
            self.asked_bytes += (step.end - step.start) * token_bytes
        elif isinstance(step, SendHome):
            self.sent_bytes += (step.end - step.start) * token_bytes
        elif isinstance(step, Attend):
            here = [part for part in step.parts if not isinstance(part, Tiles)]
            self.attended += len(here) * step.groups * layers
