"""A plan for several GPUs: what each of them holds, and how long it takes together."""

import enum
from dataclasses import dataclass


class Split(str, enum.Enum):
    """What of a model each of several GPUs has."""

    NONE = "none"
    LAYERS = "layers"
    HEADS = "heads"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """A use of one GPU's memory, and of its time in a prefill.

    Attributes:
        layers: that it computes.
        kv_heads: of a layer, as many as it has.
        weights_bytes: on it, with a layer of those that are brought.
        brought_bytes: weights that are brought to it each time that tokens pass.
        disk_bytes: of these, what is read from a disk.
        kv_device_bytes: KV on it.
        resident_bytes: of that, what is not streamed while a prompt passes.
        activation_bytes: the most that activations take.
        runtime_bytes: what CUDA takes beside all that.
        short_bytes: memory it lacks; 0 where all fits.
        busy: share of the prefill in which it works.
        kv_host_bytes: its KV in host memory, with room for pages that do not pack.
        raw_page_bytes: that room.
        answer_resident_bytes: KV that is not streamed in a decode step.
    """

    layers: int
    kv_heads: int
    weights_bytes: int
    brought_bytes: int
    disk_bytes: int
    kv_device_bytes: int
    resident_bytes: int
    activation_bytes: int
    runtime_bytes: int
    short_bytes: int
    busy: float = 1.0
    kv_host_bytes: int = 0
    raw_page_bytes: int = 0
    answer_resident_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        used = self.weights_bytes + self.kv_device_bytes + self.activation_bytes
        return used + self.runtime_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """A plan of one method on some GPUs, or why there is none.

    Attributes:
        method: standard inference, or ours with residents, exact or with tokens in 8 bits.
        gpus: how many.
        split: what each has.
        obstacle: why it cannot be, in words; then all else is 0. None where it can.
        uses: of each GPU.
        chunk_tokens: tokens of a prefill chunk; None for the whole prompt at once.
        kv_host_bytes: KV in host memory.
        kv_home_bytes: KV that lies there, or on a disk below, in the bytes that were computed.
        packed_share: bytes of a token there, over those.
        kv_disk_bytes: of that, what lies on the disk.
        disk_read_bytes: of that, what a decode step reads.
        disk_short_bytes: space on the disk that it lacks.
        weights_host_bytes: weights that stay there.
        host_short_bytes: host memory it lacks.
        max_context_tokens: the longest context that the memories hold; None for no limit.
        prefill_s: predicted seconds of the prefill.
        decode_s_per_token: predicted seconds of a decode step.
        reduce_s: of a step, what the ranks take to add up their results.
    """

    method: str
    gpus: int
    split: Split
    obstacle: str | None = None
    uses: tuple[GpuUse, ...] = ()
    chunk_tokens: int | None = None
    kv_host_bytes: int = 0
    kv_home_bytes: int = 0
    packed_share: float = 1.0
    kv_disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_short_bytes: int = 0
    weights_host_bytes: int = 0
    host_short_bytes: int = 0
    max_context_tokens: int | None = 0
    prefill_s: float = 0.0
    decode_s_per_token: float = 0.0
    reduce_s: float = 0.0

    @property
    def fits(self) -> bool:
        """Whether all memories hold it."""
        short = any(use.short_bytes for use in self.uses)
        short = short or bool(self.host_short_bytes or self.disk_short_bytes)
        return self.obstacle is None and not short

    @property
    def fullest(self) -> GpuUse:
        """The GPU that lacks most, or has least left."""
        return max(self.uses, key=lambda use: (use.short_bytes, use.total_bytes))

    @property
    def streamed_bytes(self) -> int:
        """KV that crosses the links in a decode step, unless the CPU attends it; of all GPUs."""
        beside = self.kv_home_bytes - sum(use.answer_resident_bytes for use in self.uses)
        return int(self.packed_share * beside)

    @property
    def raw_page_bytes(self) -> int:
        """Host memory for pages that do not pack, of all GPUs."""
        return sum(use.raw_page_bytes for use in self.uses)

    @property
    def brought_bytes(self) -> int:
        """Weights that cross a link each time that tokens pass."""
        return sum(use.brought_bytes for use in self.uses)

    @property
    def disk_bytes(self) -> int:
        """What is read from a disk before it crosses a link."""
        return sum(use.disk_bytes for use in self.uses)
