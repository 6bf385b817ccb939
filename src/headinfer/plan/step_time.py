"""What a pass does with the KV cache as far as time depends on it, and the parts of its time."""

from dataclasses import dataclass

_EXPOSED = 0.1
"""Share of starting that copies do not hide.

Measured beside an H100 at 100K tokens: a step took 254 ms with 256 tiles and 252 with 32, where the
link alone takes 248. With 160 tiles and the rest resident it took 98, where the link takes 93."""


def tokens_below(tokens: int, block_tokens: int, host_blocks: int) -> int:
    """Return the tokens in each layer's rows that lie on a disk, once the host was sent all.

    Args:
        tokens: in all.
        block_tokens: of a block; 0 where there is no disk.
        host_blocks: blocks of a layer that host memory holds, the newest.
    """
    blocks = -(-tokens // block_tokens) if block_tokens else 0
    return max(blocks - host_blocks, 0) * block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A method's use of memory for the KV cache, as far as time depends on it.

    Attributes:
        batch: rows.
        chunk_tokens: tokens of one prefill chunk; None for the whole prompt at once.
        tile_heads: KV heads of one streamed tile.
        tile_tokens: tokens of one streamed tile; None where nothing is streamed.
        resident_bytes: KV that stays on the device.
        kv_share: bytes read of a KV element, over its bytes as computed (less than 1 if quantised).
        host_share: share of what is not resident that the CPU attends in a decode step.
        overlap: whether copies run beside attention.
        disk_block_tokens: tokens of a block of host memory above a disk; 0 where there is none.
        disk_host_blocks: blocks of a layer that host memory holds.
        answer: the placement of decode steps, where it is another; see `plan.answering`.
    """

    batch: int = 1
    chunk_tokens: int | None = None
    tile_heads: int = 1
    tile_tokens: int | None = None
    resident_bytes: int = 0
    kv_share: float = 1.0
    host_share: float = 0.0
    overlap: bool = True
    disk_block_tokens: int = 0
    disk_host_blocks: int = 0
    answer: "Placement | None" = None

    @property
    def in_answer(self) -> "Placement":
        """The placement of decode steps, once an answer has its own plan."""
        return self.answer or self

    def disk_tokens(self, tokens: int) -> int:
        """Tokens of `tokens` in each layer's rows that lie on a disk."""
        return tokens_below(tokens, self.disk_block_tokens, self.disk_host_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A step's parts, which run beside each other.

    Attributes:
        compute_s: matrix products, attention and reading weights on the device.
        link_s: streamed tiles on their way to the device.
        link_back_s: new keys and values on their way to the host.
        start_s: the host starting copies and kernels, ahead of the link.
        host_s: the host attending its share.
        asked_s: what it takes beside that to ask the host, layer by layer, and to have its answers.
        brought_s: weights on their way to the device, which come before they are used.
        disk_s: tokens read from a disk ahead of the link, and those written to it.
    """

    compute_s: float
    link_s: float = 0.0
    link_back_s: float = 0.0
    start_s: float = 0.0
    host_s: float = 0.0
    asked_s: float = 0.0
    brought_s: float = 0.0
    disk_s: float = 0.0

    def seconds(self, *, overlap: bool) -> float:
        """Return the time of the step."""
        if not overlap:
            beside_s = self.link_s + self.link_back_s + self.start_s + self._asking_s + self.disk_s
            return self.brought_s + self.compute_s + beside_s
        # Threads of their own attend the host's share.
        slowest_s = max(self.link_s, self.disk_s, self.start_s, self._asking_s)
        streams_s = slowest_s + _EXPOSED * self.start_s
        return self.brought_s + max(self.compute_s, streams_s, self.link_back_s)

    @property
    def limited_by(self) -> str:
        """What takes the longest, in words."""
        times = {
            "computing": self.compute_s,
            "the link": max(self.link_s, self.link_back_s),
            "the disk": self.disk_s,
            "bringing weights": self.brought_s,
            "the host" if self.host_s else "starting tiles": max(self.start_s, self._asking_s),
        }
        return max(times, key=lambda name: times[name])

    @property
    def _asking_s(self) -> float:
        return self.host_s + self.asked_s
