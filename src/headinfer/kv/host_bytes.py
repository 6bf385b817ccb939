"""The host memory that one layer's tokens take, in bytes."""

import torch

from headinfer.kv.ahead import missing_tokens
from headinfer.kv.extent import Extent, Piece
from headinfer.kv.pair import Geometry
from headinfer.kv.place import Coming


class HostBytes:
    """A layer's host memory, counted; see `Ledger`.

    Attributes:
        home: shape and dtype, and the form in host memory.
        coming: memory that was asked for, and not taken yet.
        begun_slots: `[slots, slot_bytes]` of uint8 in host memory, for the raw copies of a page
            that is not full; None where there was none. See `slots_of_begun_page`.
    """

    home: Geometry
    coming: Coming
    begun_slots: torch.Tensor | None = None
    _host: list[Extent]
    _written_tokens: int

    @property
    def capacity_tokens(self) -> int:
        """Tokens that there is host memory for; looked up, as Ctrl-C may come beside any change."""
        if not self._host:
            return 0
        last = self._host[-1]
        return last.start + last.capacity

    @property
    def promised_tokens(self) -> int:
        """Tokens that there is host memory for, or was asked for."""
        return self.capacity_tokens + self.coming.tokens

    def missing_tokens(self, tokens: int) -> int:
        """Return the tokens to ask for, or to reserve, where there are to be `tokens` in all."""
        return missing_tokens(self.promised_tokens, tokens)

    def wanting_tokens(self, tokens: int) -> int:
        """Return what the page behind so many tokens wants to be full; 0 where none is begun."""
        for extent in reversed(self._host):
            if extent.start <= tokens < extent.limit:
                return (extent.start - tokens) % extent.format.row_tokens
        return 0

    @property
    def begun_tokens(self) -> int:
        """Tokens of the host's last page, where that is not full."""
        last = next((extent for extent in reversed(self._host) if extent.tokens), None)
        return 0 if last is None else last.tokens % last.format.row_tokens

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held, or asked for.

        What is shared counts in full, as it may have to be copied.
        """
        num_bytes = self.coming.num_bytes
        for extent in self._host:
            num_bytes += extent.piece.host_bytes
        return num_bytes

    @property
    def host_pieces(self) -> list[Piece]:
        """The pieces of host memory it holds; others may hold them, too."""
        return [extent.piece for extent in self._host if extent.piece.region is None]

    @property
    def raw_memory(self) -> list[torch.Tensor]:
        """Memory that packed pages refer to, also those on the disk; it may be named repeatedly."""
        return [raw for extent in self._host for raw in extent.piece.raw]

    @property
    def disk_tokens(self) -> int:
        """The oldest tokens, which the host holds on the disk."""
        return max([part.end for part in self._host if part.piece.region is not None], default=0)

    @property
    def unwritten_bytes(self) -> int:
        """Bytes of those that this ledger may still take of what the system calls available.

        These were reserved and never written, or are shared by several rows, whose order may
        change.
        """
        written = max(self._written_tokens - self.disk_tokens, 0)
        unwritten = max(self.host_bytes - self.home.num_bytes(written), 0)
        if self.home.batch == 1:  # what is shared is never written to, but behind it
            return unwritten
        return unwritten + sum([extent.piece.shared_bytes for extent in self._host])
