"""What the host holds of a layer: the tokens from 0 on, which are lengthened, cut and shared."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from headinfer.kv.disk_place import DiskPlace
from headinfer.kv.extent import Extent, Tile
from headinfer.kv.growth import Growth
from headinfer.kv.pair import ALL_HEADS, Geometry


class HostTokens(Growth):
    """A layer's tokens in host memory and on the disk; see `Ledger`.

    Attributes:
        geometry: shape and dtype; its batch follows the selection of rows.
        half_done: whether a change of where tokens lie has begun and not ended, as after Ctrl-C:
            what the ledger says may not be so.
    """

    geometry: Geometry
    half_done: bool

    def host_tiles(
        self,
        start: int,
        end: int,
        *,
        max_tokens: int | None = None,
        groups: Sequence[slice] = (ALL_HEADS,),
    ) -> Iterator[Tile]:
        """Yield the tokens from `start` to before `end` as the host holds them, in order.

        Args:
            start: first token.
            end: one past the last; there must be memory for it.
            max_tokens: the most a tile may have; tiles never cross extents either.
            groups: KV heads of a tile; all tokens of one group come before those of the next.
        """
        for heads in groups:
            for extent in self._host:
                piece, whole, origin = extent.piece, extent.whole, extent.start
                form = extent.format
                low, high = max(start, origin), min(end, origin + extent.capacity)
                step = max_tokens or max(high - low, 1)
                for first in range(low, high, step):
                    tokens = min(step, high - first)
                    yield Tile(first, tokens, piece, whole, first - origin, heads, None, form)

    def extend_host(self, tokens: int) -> list[Tile]:
        """Lengthen what the host holds; return where the tokens must be written, in order."""
        start, end = self.host_tokens, self.host_tokens + tokens
        shared = self._shared_behind()
        if shared is not None:
            self._leave_shared(shared)
        if self.capacity_tokens < end:
            self.reserve(end)
        self.host_tokens = end
        self._written_tokens = max(self._written_tokens, end)
        self._count_tokens()
        self.version += 1
        return list(self.host_tiles(start, end))

    def home_with_room(self) -> Extent | None:
        """Return the host's extent that has all tokens and memory for one more, if there is one."""
        shared = self._shared_behind()
        if shared is not None:
            self._leave_shared(shared)
        first = self._host[0] if self._host else None
        return first if first is not None and first.limit > self.host_tokens else None

    def crop_host(self, tokens: int) -> None:
        """Have the host hold the first `tokens` tokens alone; their memory stays."""
        if tokens < self.host_tokens:
            self.half_done = True  # as a block may have to be read
            self._leave_disk(tokens)
            self.host_tokens = tokens
            self._count_tokens()
            self.version += 1
            self.half_done = False

    def select_host(self, rows: Sequence[int], *, anew: bool = False) -> None:
        """Make row `i` of what the host holds what row `rows[i]` was; rows may repeat or be left.

        With as many rows as before, and memory that nobody shares, this happens in place.

        Args:
            rows: numbers of rows.
            anew: whether to take memory for the tokens alone, in any case.

        Raises:
            DiskError: the disk has no room for them, or failed.
            MemoryPlanError: the host memory cannot be had.
        """
        self.lower_blocks()
        index, old = torch.tensor(rows, dtype=torch.long, device="cpu"), self.home
        self.geometry = replace(self.geometry, batch=len(rows))
        self.home = replace(old, batch=len(rows))
        if len(rows) != old.batch:
            self.coming.cancel()  # it is of another size
        for position, source in enumerate(self._host):
            if source.piece.region is not None:
                assert isinstance(self._place, DiskPlace)
                target = self._place.select(source, old, self.home, rows)
            else:
                target = self._selected(source, old, index, anew=anew)
            if target is source:
                continue
            self._host[position] = target
            self._place.give_back(source)
            self._written_tokens = self.host_tokens
        self._count_tokens()
        self.version += 1

    def _selected(self, source: Extent, old: Geometry, rows: torch.Tensor, *, anew: bool) -> Extent:
        """Return an extent with other rows of one that the host holds; itself, if in place."""
        place = self._place
        in_place = not anew and len(rows) == old.batch and source.piece.holders == 1
        capacity = source.needed_tokens if anew else source.capacity
        target = source if in_place else place.take(self.home, capacity, source.start)
        place.copy_rows(source, target, rows)
        return target

    def _share_host(self, other: "HostTokens") -> None:
        """Hold in the same memory what another one holds, and nothing of one's own."""
        shared = other.host_tokens - other.begun_tokens
        self._host = [extent.share(shared) for extent in other._host if extent.start < shared]
        if other.begun_tokens:
            self._host.append(self._place.take(self.home, self.home.format.row_tokens, shared))
        self.host_tokens = self._written_tokens = shared
        self._count_tokens()
        self.version += 1

    def trim(self) -> None:
        """Give back host memory that was asked for, or reserved, and has no tokens."""
        self.coming.cancel()
        while self._host and not self._host[-1].tokens:
            self._place.give_back(self._host.pop())

    def _clear_host(self) -> None:
        """Forget the host's tokens and give back its memory."""
        self.coming.cancel()
        while self._host:  # forgotten first: given back twice, others would lose it
            self._place.give_back(self._host.pop())
        self.host_tokens = self._written_tokens = 0
        self.begun_slots = None
