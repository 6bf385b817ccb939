"""Where a method has its KV."""

from dataclasses import dataclass

DENSE = "dense"
"""Name of KV that lies in memory as it is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPart:
    """A count of what one GPU of several has to do with the KV.

    Attributes:
        layers: that compute there.
        kv_bytes: of the context, in these layers and heads.
        streamed_bytes: what crosses its link in every decode step.
        host_attended_bytes: what the CPU attends on its behalf.
        resident_tokens: that it keeps of each layer.
        prefill_busy: share of the prefill in which it worked; None where nobody knows.
    """

    layers: int
    kv_bytes: int
    streamed_bytes: int
    host_attended_bytes: int
    resident_tokens: int
    prefill_busy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A count of the bytes of KV in each place.

    Attributes:
        host_bytes: in host memory.
        device_bytes: on the device.
        streamed_bytes: what crosses the link to the device in every decode step.
        host_attended_bytes: what the CPU attends in every decode step on behalf of the device.
        unseen_bytes: what no query sees, where heads stream; it may not be held at all.
        format: the form of KV in host memory: "dense", "packed", "int8" or "fp8".
        raw_page_bytes: room in host memory for pages that do not pack; it is in `host_bytes`.
        parts: the same for each GPU, where the model is spread over several.
        disk_bytes: on a disk below host memory.
        disk_read_bytes: of that, what every decode step reads.
    """

    host_bytes: int
    device_bytes: int
    streamed_bytes: int = 0
    host_attended_bytes: int = 0
    unseen_bytes: int = 0
    format: str = DENSE
    raw_page_bytes: int = 0
    parts: tuple[HeldPart, ...] = ()
    disk_bytes: int = 0
    disk_read_bytes: int = 0
