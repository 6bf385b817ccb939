"""What of a host's memory KV caches can have, and what is kept back for what. Pure arithmetic."""

from dataclasses import dataclass

from headinfer.errors import MemoryPlanError
from headinfer.units import format_bytes

_PAGE_BYTES = 4096

_PAGE_TABLE_BYTES = 8
"""A page's entry in the process's page table. Large pages have as many set aside, to be split."""

_LOCKED_PAGE_BYTES = 80
"""What a page takes besides once it is locked for a GPU.

Measured while 122 GiB were locked beside an H100 (driver 580, Linux 6.18). The driver's lists grew
by 48 bytes a page, and memory shrank by 77.
"""

_CUDA_PROCESS_BYTES = 2**30
"""What a process still takes after `attach`, beside KV and what it computes with: libraries that
load later and programs made for the GPU.

Measured beside the same H100, in prefill and decode of 100K tokens with Llama-3-8B's widths (torch
2.11): 0.71 GiB.
"""

_PROCESS_BYTES = 128 * 2**20
"""What a process still takes after `attach` without CUDA.

Measured in the runs of the README's table, 32K tokens on two threads: 39 MiB.
"""

_RESERVE_DIVISOR, _MOST_RESERVE_BYTES = 64, 4 * 2**30
"""Share of all memory that is left for other processes, and the most of it. It is also for what the
system calls available but gives up late."""


def _page_bytes(device: str) -> int:
    return _PAGE_TABLE_BYTES + (_LOCKED_PAGE_BYTES if device == "cuda" else 0)


def _reserve_bytes(all_bytes: int) -> int:
    return min(all_bytes // _RESERVE_DIVISOR, _MOST_RESERVE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRoom:
    """A host's room: what of its memory is left for KV.

    Attributes:
        device: the kind of device the KV is for: "cpu", "cuda" or "simulated".
        all_bytes: the host's memory, or its container's.
        available_bytes: what of it can still be taken.
        working_bytes: what of that a call takes to compute with: activations, where the host's
            processor computes.
        given_bytes: the most that all KV caches may take; None for no limit but the memory.
        held_bytes: what they have taken of that.
    """

    device: str
    all_bytes: int
    available_bytes: int
    working_bytes: int = 0
    given_bytes: int | None = None
    held_bytes: int = 0

    @classmethod
    def of_machine(cls, all_bytes: int, device: str) -> "HostRoom":
        """Return the room of a machine that does nothing else."""
        return cls(device=device, all_bytes=all_bytes, available_bytes=all_bytes)

    @property
    def process_bytes(self) -> int:
        """What the process still takes, whatever the context."""
        return _CUDA_PROCESS_BYTES if self.device == "cuda" else _PROCESS_BYTES

    @property
    def reserve_bytes(self) -> int:
        """What is left for others."""
        return _reserve_bytes(self.all_bytes)

    @property
    def machine_bytes(self) -> int:
        """The most KV that the memory holds beside all that is kept back."""
        kept = self.process_bytes + self.working_bytes + self.reserve_bytes
        left = max(self.available_bytes - kept, 0)
        return left * _PAGE_BYTES // (_PAGE_BYTES + _page_bytes(self.device))

    @property
    def kv_bytes(self) -> int:
        """The most KV that may be taken."""
        if self.given_bytes is None:
            return self.machine_bytes
        return max(min(self.given_bytes - self.held_bytes, self.machine_bytes), 0)

    def less_than_given(self) -> str | None:
        """Say where there is less memory than `given_bytes`; None where there is not."""
        if self.given_bytes is None or self.given_bytes <= self.machine_bytes:
            return None
        return (
            f"host_memory={format_bytes(self.given_bytes)} is more than the "
            f"{format_bytes(self.machine_bytes)} there is room for now; caches are held to that"
        )

    def check(self, needed_bytes: int, what: str) -> None:
        """Refuse KV that there is no room for.

        Args:
            needed_bytes: bytes of KV to come.
            what: what needs them, for the message.

        Raises:
            MemoryPlanError: that is more than there is room for; the message has the arithmetic.
        """
        if needed_bytes <= self.kv_bytes:
            return
        raise MemoryPlanError(
            f"{what} needs {format_bytes(needed_bytes)} more of CPU memory, and "
            f"{format_bytes(self.kv_bytes)} can be had{self._why()}"
        )

    def _why(self) -> str:
        given = self.given_bytes
        if given is not None and given - self.held_bytes <= self.machine_bytes:
            taken = f", {format_bytes(self.held_bytes)} of it taken" if self.held_bytes else ""
            return (
                f" (host_memory is {format_bytes(given)}{taken}); shorten the prompt or give more "
                "host_memory"
            )
        pages = "page tables and locked pages" if self.device == "cuda" else "page tables"
        tables_bytes = self.machine_bytes * _page_bytes(self.device) // _PAGE_BYTES
        kept = [(self.process_bytes, "the process itself"), (self.working_bytes, "activations")]
        parts = [f"{format_bytes(size)} for {purpose}" for size, purpose in kept if size]
        parts.append(f"{format_bytes(tables_bytes)} for {pages}")
        parts.append(f"{format_bytes(self.reserve_bytes)} in reserve")
        asked = "" if given is None else f", not the {format_bytes(given)} given as host_memory"
        return (
            f"{asked}: {format_bytes(self.available_bytes)} are available, less "
            f"{', '.join(parts)}; shorten the prompt or free CPU memory"
        )


def machine_bytes_for(kv_bytes: int, device: str) -> int:
    """Return the least memory of a machine that does nothing else and has room for so much KV."""
    if kv_bytes <= 0:
        return 0
    tables = -(-kv_bytes * _page_bytes(device) // _PAGE_BYTES)
    used = kv_bytes + tables + HostRoom.of_machine(0, device).process_bytes
    # The reserve is a share of the whole, as far as that is below the most it may be.
    share = -(-used * _RESERVE_DIVISOR // (_RESERVE_DIVISOR - 1))
    least = used + min(share - used, _MOST_RESERVE_BYTES)
    while HostRoom.of_machine(least, device).kv_bytes < kv_bytes:  # by what was rounded
        least += 1
    return least
