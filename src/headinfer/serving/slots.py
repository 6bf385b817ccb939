"""What each request and each kept prefix holds, for whoever looks on."""

from dataclasses import dataclass
from typing import Literal

from headinfer.serving.events import Progress

State = Literal["running", "waiting", "kept", "saved"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """A state of one request or one kept prefix.

    Attributes:
        id: of the ticket, or of the prefix.
        state: "running" or "waiting" for requests; "kept" for a prefix in memory, "saved" for one
            that only the disk has.
        position: requests that begin before a waiting one; None for all others.
        tokens: that its KV cache holds.
        device_bytes: GPU memory that it holds for them.
        host_bytes: CPU memory that it holds; what several share counts for each.
        disk_bytes: of its files.
        progress: of a running request's prompt, once it has begun.
        completion_tokens: of a running request's answer so far.
    """

    id: str
    state: State
    position: int | None = None
    tokens: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    progress: Progress | None = None
    completion_tokens: int = 0
