"""The ordered table of kernels that one kind of layer is attended by."""

from collections.abc import Callable, Sequence

import torch

from headinfer.attend.band import Band
from headinfer.attend.fused_call import FusedCall
from headinfer.attend.partial import Accumulator
from headinfer.attend.work import Kernel, TokenWork, Total, Work, by_kv_head, tile_in_hand
from headinfer.device.base import PlaceError
from headinfer.kv.extent import Tile
from headinfer.kv.pair import KV


class Kernels:
    """A table of kernels, best first; chosen once by `select_kernels`.

    Args:
        kernels: what the table is for, best first.
        rest: what attends the works that none of `kernels` serves, if there are any.

    Attributes:
        kernels: both, in this order; the last serves every work.
        find_band: finds what attends the queries of a chunk within a window, or None where masks
            do. It tries that out the first time, which models without windows are spared.
    """

    find_band: Callable[[], Band | None] = staticmethod(lambda: None)

    def __init__(self, kernels: Sequence[Kernel], rest: Sequence[Kernel] = ()) -> None:
        self.kernels: tuple[Kernel, ...] = (*kernels, *rest)
        self._named = kernels
        # The newest, as all layers of a prompt ask the same. Replaced at once: threads share it.
        self._square: tuple[tuple[object, ...], FusedCall | None] | None = None

    @property
    def name(self) -> str:
        """The names of the kernels, without the rest."""
        return " and ".join(kernel.name for kernel in self._named if kernel.name)

    def begin(self, query: torch.Tensor, *, scale: float) -> Total:
        """Return what collects the partials of some queries.

        Args:
            query: `[batch, kv_heads, group, q_len, key_dim]`, the query of each work into it.
            scale: factor of the scores, the same in each work into it.
        """
        return Accumulator()

    def pick(self, work: Work) -> Kernel:
        """Return the first kernel that serves a work."""
        for kernel in self.kernels:
            if kernel.serves(work):
                return kernel
        raise AssertionError("the last kernel of a table serves every work")

    def attend_square(self, queries: torch.Tensor, new: KV, scale: float) -> torch.Tensor | None:
        """Attend the first tokens of a layer to themselves, where one operator's output will do.

        Args:
            queries: `[batch, query_heads, q_len, key_dim]`.
            new: their keys and values, `[batch, kv_heads, q_len, dim]`.
            scale: factor of the scores.

        Returns:
            `[batch, q_len, query_heads, value_dim]`, contiguous, in the queries' dtype. None where
            no kernel has such an operator; nothing was done then.
        """
        asked, known = (queries.shape, new.keys.shape, queries.dtype), self._square
        if known is None or known[0] != asked:
            work = Work(by_kv_head(queries, new), (tile_in_hand(new),), scale, causal=True)
            known = self._square = asked, self.pick(work).square(work)
        call = known[1]
        if call is None:
            return None
        out = call(queries, new.keys, new.values, scale=scale)[0]
        return out.transpose(1, 2).contiguous()  # as each operator's output lies already

    def attend_counted(self, work: Work) -> None:
        """Attend the one tile of a work, whose `counted` says how many tokens it has.

        Raises:
            PlaceError: these kernels cannot read that number.
        """
        tile = counted_tile(work.tiles[0])
        if tile.tokens:
            work.tiles = (tile,)
            self.pick(work).attend(work)

    def decode(self, work: TokenWork) -> None:
        """Put a new token into its place, and write its attention.

        Raises:
            PlaceError: the work is captured, and these kernels cannot read the token's place.
        """
        tile, sink_tokens = work.tile, work.sink_tokens
        if work.place is not None:
            tile, sink_tokens = tile_at(tile, work.place)
        for tokens, token in zip(tile.kv, work.new, strict=True):
            tokens[:, :, -1:].copy_(token)
        into = self.begin(work.query, scale=work.scale)
        tiles: tuple[Tile, ...] = (tile,)
        if sink_tokens:
            tiles = (tile._replace(start=0, first=0, tokens=sink_tokens), tile)
        past = Work(work.query, tiles, work.scale, into)
        for kernel in self.kernels:  # `pick`, without its frame
            if kernel.serves(past):
                kernel.attend(past)
                break
        if work.sinks is not None:
            into.add_sinks(work.sinks)
        into.write(work.out)


def tile_at(tile: Tile, place: torch.Tensor) -> tuple[Tile, int]:
    """Return a tile with the `first` and `tokens` that a place says, and the sinks it says.

    See `TokenWork.place`.

    Raises:
        PlaceError: the place is in memory that only a device reads without waiting.
    """
    first, tokens, sink_tokens = _numbers(place)
    return tile._replace(first=first, tokens=tokens), sink_tokens


def counted_tile(tile: Tile) -> Tile:
    """Return a tile with as many tokens as its `counted` says.

    Raises:
        PlaceError: that is in memory which only a device reads without waiting.
    """
    assert tile.counted is not None
    (tokens,) = _numbers(tile.counted)
    return tile._replace(tokens=tokens, counted=None)


def _numbers(memory: torch.Tensor) -> list[int]:
    if memory.device.type != "cpu":
        raise PlaceError("its attention kernel cannot read from memory how many tokens there are")
    return [int(number) for number in memory.tolist()]
