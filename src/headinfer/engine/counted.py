"""The memory that the tokens of a cache take, in bytes."""

from collections.abc import Hashable

from headinfer.engine.raw_pages import RawPages
from headinfer.kv.ahead import missing_tokens
from headinfer.kv.ledger import Ledger
from headinfer.kv.place import HostPlace
from headinfer.plan.memory import block_bytes
from headinfer.plan.plan import Plan


class CountedTokens:
    """A cache's tokens, whose memory is counted; see `HeldTokens`.

    Attributes:
        plan: its sizes.
        closed: whether the memory was given back.
        parked: whether it has no arena.
        drafting: whether the tokens that come are drafts.
    """

    plan: Plan
    closed: bool
    parked: bool
    drafting: bool
    _ledgers: list[Ledger]
    _full: list[Ledger]
    _place: HostPlace
    _arena_bytes = 0
    _expected_tokens = 0
    _raw: RawPages | None = None  # stays when the arena goes: tokens refer to its block

    @property
    def can_give_up(self) -> bool:
        """Whether it has resident tokens that it can do without now."""
        return self.plan.resident_tokens > 0 and not self.drafting

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of device memory held for KV."""
        return self._arena_bytes + self.window_bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of them that sliding windows take."""
        if self.parked:
            return 0
        tails = [ledger.tail for ledger in self._ledgers if ledger.track.window_tokens is not None]
        return sum([tail.piece.memory.numel() for tail in tails if tail is not None])

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of host memory held for KV, or asked for."""
        taken = sum([ledger.host_bytes for ledger in self._full]) + self._raw_page_bytes
        return taken + self._disk_buffers_bytes

    @property
    def taken_host_bytes(self) -> int:
        """Bytes of host memory held for KV, or promised to it, which another plan may use.

        Pages that do not pack may take more than planned, and that stays.
        """
        beyond = max(self._raw_page_bytes - self.plan.raw_page_bytes, 0)
        coming = self._coming_blocks_bytes if self.plan.disk_block_tokens else 0
        return self.host_kv_bytes + coming - beyond

    @property
    def _disk_buffers_bytes(self) -> int:
        """Bytes of host memory that tokens on the disk are read to, and written from."""
        buffers_bytes = 0 if self.parked or self.closed else self.plan.disk_buffers_bytes
        # What failed to be written is beside where it is parked, too.
        return buffers_bytes + self._place.beside_bytes + self._unstaged_bytes

    @property
    def disk_tokens(self) -> int:
        """Tokens of the last layer, in each row, that lie on the disk."""
        return self._full[-1].disk_tokens if self._full else 0

    @property
    def _raw_page_bytes(self) -> int:
        """Bytes of host memory for pages that do not pack."""
        return sum(self._raw_blocks().values())

    def _raw_blocks(self) -> dict[int, int]:
        """Return the bytes of each block of such pages, by its identity."""
        if not self.plan.shape.packs:
            return {}
        blocks = [] if self._raw is None else self._raw.memory
        held = [raw for ledger in self._full for raw in ledger.raw_memory]
        return {id(raw): raw.nbytes for raw in (*blocks, *held)}

    def host_pieces(self) -> dict[Hashable, int]:
        """Return the bytes of each piece of host memory, by what copies have in common.

        Copies of several rows have nothing in common: the order of rows may change, which takes
        memory for all of them. Neither have those above a disk: whichever writes a block there
        takes memory of its own, and the other keeps what was shared. Nobody copies raw pages.
        """
        parts = self.plan.batch > 1 or (self.plan.disk_block_tokens and not self.parked)
        own = id(self) if parts else None
        held = {
            id(piece): piece.host_bytes for ledger in self._full for piece in ledger.host_pieces
        }
        pieces: dict[Hashable, int] = {(own, piece): size for piece, size in held.items()}
        pieces.update(self._raw_blocks().items())
        return pieces | {(id(self), "on its way"): self._disk_buffers_bytes}

    @property
    def coming_host_bytes(self) -> int:
        """Bytes of host memory that were asked for and not taken yet."""
        if self.plan.disk_block_tokens:
            return self._coming_blocks_bytes
        return sum(ledger.coming.num_bytes for ledger in self._full)

    @property
    def _coming_blocks_bytes(self) -> int:
        """Bytes that the expected tokens will take above a disk."""
        return self._blocks_bytes(self._expected_tokens)

    def _blocks_bytes(self, tokens: int) -> int:
        """Return the bytes to be taken for `tokens` tokens in all: blocks, and raw pages."""
        plan = self.plan
        raw_bytes = max(plan.raw_page_bytes - self._raw_page_bytes, 0) if tokens else 0
        blocks = min(-(-tokens // plan.disk_block_tokens), plan.disk_host_blocks)
        size = [block_bytes(ledger.home.num_bytes(plan.disk_block_tokens)) for ledger in self._full]
        held = [ledger.host_bytes for ledger in self._full]
        missing = [max(blocks * each - had, 0) for each, had in zip(size, held, strict=True)]
        return sum(missing) + raw_bytes

    @property
    def awaited_host_bytes(self) -> int:
        """Bytes of those that the system was not asked for yet."""
        if self.plan.disk_block_tokens:
            return self._coming_blocks_bytes + self._unstaged_bytes
        return sum(ledger.coming.awaited_bytes for ledger in self._full)

    @property
    def _unstaged_bytes(self) -> int:
        """Bytes of those for blocks that are being written which were not taken yet."""
        if self.parked or self.closed:
            return 0
        return max(self.plan.disk_staging_bytes - self._place.beside_bytes, 0)

    @property
    def unwritten_host_bytes(self) -> int:
        """Bytes of those that were never written, which the system may not have given yet."""
        return sum(ledger.unwritten_bytes for ledger in self._full) + self._unstaged_bytes

    def missing_bytes(self, tokens: int) -> int:
        """Return the bytes of host memory to be added for layers to hold `tokens` tokens."""
        if self.plan.disk_block_tokens:
            return max(self._blocks_bytes(tokens) - self._coming_blocks_bytes, 0)
        missing = [missing_tokens(ledger.promised_tokens, tokens) for ledger in self._full]
        if not any(missing):
            return 0
        raw_bytes = max(self.plan.raw_page_bytes - self._raw_page_bytes, 0)
        return raw_bytes + sum(
            [ledger.home.num_bytes(more) for ledger, more in zip(self._full, missing, strict=True)]
        )
