"""How what the host holds of a layer grows: by pieces of memory, or by blocks above a disk."""

from headinfer.kv.disk_place import DiskPlace
from headinfer.kv.extent import Extent
from headinfer.kv.host_bytes import HostBytes
from headinfer.kv.place import HostPlace


class Growth(HostBytes):
    """A layer's host memory, which grows and is cut; see `Ledger`.

    Attributes:
        host_tokens: tokens that the host holds.
        version: changes with what the host holds.
    """

    host_tokens: int
    version: int
    _place: HostPlace

    def reserve(self, tokens: int) -> None:
        """Have host memory for `tokens` tokens in all, and wait for no more than that.

        What was not asked for is one extent more. Above a disk it is blocks, and the oldest ones go
        to the disk for them.

        Raises:
            DiskError: the disk has no room, or failed; blocks are where they were.
            MemoryPlanError: the host memory cannot be had.
        """
        place = self._place
        if isinstance(place, DiskPlace):
            while self.capacity_tokens < tokens:
                self._add_block(place)
            return
        while (start := self.capacity_tokens) < tokens:
            extent = self.coming.take(self.home, start)
            if extent is None:
                break
            self._host.append(extent)
        missing = self.missing_tokens(tokens)
        if missing > 0:
            start = self.capacity_tokens
            missing = self.home.format.covering(missing)  # their rows are paid for
            self._host.append(place.take(self.home, missing, start))

    def sent_at_once(self, tokens: int) -> int:
        """Return how many of some new tokens the host can take at once: those of a block."""
        block_tokens = self._place.block_tokens
        if not block_tokens:
            return tokens
        room = self.capacity_tokens - self.host_tokens
        return min(tokens, room if room > 0 else block_tokens)

    def _add_block(self, place: DiskPlace) -> None:
        """Have memory for a block more: that of the oldest one, where there may be no other."""
        start, lowered = self.capacity_tokens, self._num_lowered
        if len(self._host) - lowered < place.host_blocks:
            self._host.append(place.take(self.home, place.block_tokens, start))
            return
        oldest = self._host[lowered]
        assert oldest.end <= self.host_tokens, "a block goes to the disk that was never filled"
        lower = place.lower(oldest, self.home)
        block = place.reuse(oldest, self.home, start)
        if block is not None:  # in one statement, as Ctrl-C may come before any
            self._host[lowered:] = [lower, *self._host[lowered + 1 :], block]
        else:
            place.settle()
            self._host[lowered] = lower  # first: given back twice, others would lose it
            place.give_back(oldest)
            self._host.append(place.take(self.home, place.block_tokens, start))
        self.version += 1

    def disk_tokens_of(self, tokens: int) -> int:
        """Return the tokens on the disk once the host holds `tokens` tokens in all."""
        place, lowered = self._place, self._num_lowered
        if not isinstance(place, DiskPlace):
            return 0
        shared = bool(self._host) and self._host[-1].piece.holders > 1  # it may be cut
        capacity = self.host_tokens if shared else self.capacity_tokens
        more = -(-max(tokens - capacity, 0) // place.block_tokens)
        lowered += max(more - max(place.host_blocks - len(self._host) + lowered, 0), 0)
        if not lowered:
            return 0
        beyond = max(lowered - len(self._host), 0) * place.block_tokens
        return min(self._host[min(lowered, len(self._host)) - 1].limit + beyond, tokens)

    @property
    def _num_lowered(self) -> int:
        """How many extents lie on the disk: the first ones."""
        for position, extent in enumerate(self._host):
            if extent.piece.region is None:
                return position
        return len(self._host)

    def lower_blocks(self) -> None:
        """Have no more blocks in memory than may be, with no work in flight that touches them."""
        place = self._place
        if not isinstance(place, DiskPlace):
            return
        lowered = self._num_lowered
        while len(self._host) - lowered > place.host_blocks:
            block = self._host[lowered]
            if not block.tokens:  # nothing lies in it, nor in those behind
                place.give_back(self._host.pop())
                continue
            self._host[lowered] = place.write(block, self.home)
            place.give_back(block)
            lowered += 1
            self.version += 1

    def _leave_shared(self, tokens: int) -> None:
        """Give up host memory behind `tokens` where another ledger reads it."""
        for position, extent in enumerate(self._host):
            kept_tokens = max(tokens - extent.start, 0)
            # A page that is packed anew has tokens of before.
            written = kept_tokens - kept_tokens % extent.format.row_tokens
            shared = extent.piece.holders > 1 and written < extent.piece.shared_tokens
            if shared and extent.limit > tokens:
                self._cut(position, extent, kept_tokens)
                return

    def _cut_disk(self, tokens: int) -> None:
        """Give up what lies behind `tokens`, where that begins on the disk.

        Must be called with no work in flight that touches it.
        """
        for position, extent in enumerate(self._host[: self._num_lowered]):
            if extent.limit > tokens:
                self._cut(position, extent, max(tokens - extent.start, 0))
                return

    def _cut(self, position: int, extent: Extent, kept_tokens: int) -> None:
        """Keep so many tokens of an extent, and none behind it."""
        extent.capacity = kept_tokens
        kept = position + (extent.capacity > 0)
        while len(self._host) > kept:
            self._place.give_back(self._host.pop())
