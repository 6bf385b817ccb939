"""How what the host holds of a layer grows: by pieces of memory, or by blocks above a disk."""

from collections.abc import Sequence

import torch

from headinfer.errors import DiskError, MemoryPlanError
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

    def forget_raw(self, memory: Sequence[torch.Tensor]) -> None:
        """Let go of memory for pages as they are, of which none refers to it."""
        for extent in self._host:
            extent.piece.forget(memory)

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
        start = self.capacity_tokens
        while start < tokens:
            extent = self.coming.take(self.home, start)
            if extent is None:  # the rows of what is missing are paid for
                missing = self.home.format.covering(self.missing_tokens(tokens))
                extent = place.take(self.home, missing, start)
            self._host.append(extent)
            start += extent.capacity

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
        if place.leaves_behind(oldest, self.home):
            block = place.take_beside(self.home, start)
            lower, leaving = place.on_its_way(oldest, self.home)
            # In one statement, as Ctrl-C may come before any. Only then its memory is given away.
            self._host[lowered:] = [lower, *self._host[lowered + 1 :], block]
            self.version += 1
            place.leave(leaving)
            return
        lower = place.lower(oldest, self.home)
        reused = place.reuse(oldest, self.home, start)
        if reused is not None:  # in one statement, as Ctrl-C may come before any
            self._host[lowered:] = [lower, *self._host[lowered + 1 :], reused]
            self.version += 1
        else:
            place.settle(oldest)
            self._host[lowered] = lower  # first: given back twice, others would lose it
            self.version += 1
            place.give_back(oldest)
            self._host.append(place.take(self.home, place.block_tokens, start))

    def disk_tokens_of(self, tokens: int) -> int:
        """Return the tokens on the disk once the host holds `tokens` tokens in all."""
        place, lowered = self._place, self._num_lowered
        if not isinstance(place, DiskPlace):
            return 0
        capacity, extents, cut = self.capacity_tokens, len(self._host), self._shared_behind()
        if cut is not None:  # as it will be for the next tokens
            capacity = self.host_tokens
            extents = cut + (capacity > self._host[cut].start)
            lowered = min(lowered, extents)
        more = -(-max(tokens - capacity, 0) // place.block_tokens)
        lowered += max(more - max(place.host_blocks - extents + lowered, 0), 0)
        if not lowered:
            return 0
        if lowered > extents:
            return min(capacity + (lowered - extents) * place.block_tokens, tokens)
        return min(capacity if lowered == extents else self._host[lowered - 1].limit, tokens)

    @property
    def _num_lowered(self) -> int:
        """How many extents lie on the disk: the first ones."""
        for position, extent in enumerate(self._host):
            if extent.piece.region is None:
                return position
        return len(self._host)

    def lower_blocks(self) -> None:
        """Have no more blocks in memory than may be, with no work in flight that touches them.

        Raises:
            DiskError: the disk has no room for the others, or failed.
        """
        place = self._place
        if not isinstance(place, DiskPlace):
            return
        lowered = self._num_lowered
        while len(self._host) - lowered > place.host_blocks:
            if not self._host[-1].tokens:  # those that are full then lie one behind the other
                place.give_back(self._host.pop())
                continue
            block = self._host[lowered]
            self._host[lowered] = place.write(block, self.home)
            place.give_back(block)
            lowered += 1
            self.version += 1
        self._count_tokens()

    def _count_tokens(self) -> None:
        """Have extents hold the host's tokens, which they tile without a gap or an overlap.

        Whatever changes extents ends with this.
        """
        start, below, host_tokens = 0, True, self.host_tokens
        for extent in self._host:
            assert extent.start == start, "extents leave a gap, or overlap"
            limit = start + extent.capacity
            extent.tokens = max(min(host_tokens, limit) - start, 0)
            on_disk = extent.piece.region is not None
            assert below or not on_disk, "a block is on the disk, and an older one in memory"
            assert not on_disk or extent.tokens == extent.capacity, "a block on the disk has gaps"
            start, below = limit, on_disk
        assert start >= host_tokens, "tokens of the host lie nowhere"

    def _shared_behind(self) -> int | None:
        """Return the first extent with room behind the host's tokens that another ledger reads."""
        tokens = self.host_tokens
        for position, extent in enumerate(self._host):
            shared = extent.piece.holders > 1
            if shared and extent.limit > tokens and _is_shared(extent, tokens):
                return position
        return None

    def _leave_shared(self, position: int) -> None:
        """Give up host memory behind the host's tokens, from an extent that is shared on."""
        self._cut(position, max(self.host_tokens - self._host[position].start, 0))

    def _leave_disk(self, tokens: int) -> None:
        """Give up what lies behind `tokens` on the disk; bring the block back that is cut.

        So the tokens to come lie where they would without a disk. Where the block cannot be brought
        back it ends with the tokens that are kept, and the next ones begin another.

        Must be called with no work in flight that touches it.
        """
        place = self._place
        if not isinstance(place, DiskPlace):
            return
        for position, extent in enumerate(self._host[: self._num_lowered]):
            if extent.limit <= tokens:
                continue
            capacity, kept_tokens = extent.capacity, max(tokens - extent.start, 0)
            self._cut(position, kept_tokens)
            if kept_tokens and not _is_shared(extent, tokens):
                extent.capacity = capacity
                try:
                    block = place.bring(extent, self.home)
                except (DiskError, MemoryPlanError):
                    extent.capacity = kept_tokens
                else:
                    self._host[position] = block
                    place.give_back(extent)
            return

    def _cut(self, position: int, kept_tokens: int) -> None:
        """Keep so many tokens of an extent, and none behind it."""
        extent = self._host[position]
        extent.capacity = kept_tokens
        extent.tokens = min(extent.tokens, kept_tokens)
        kept = position + (extent.capacity > 0)
        while len(self._host) > kept:
            self._place.give_back(self._host.pop())


def _is_shared(extent: Extent, tokens: int) -> bool:
    """Whether another ledger reads what tokens behind `tokens` would be written over."""
    kept_tokens = max(tokens - extent.start, 0)
    # A page that is packed anew has tokens of before.
    written = kept_tokens - kept_tokens % extent.format.row_tokens
    return extent.piece.holders > 1 and written < extent.piece.shared_tokens
