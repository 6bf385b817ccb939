"""One attention layer: its heads by how far back they see, and the way between their two orders."""

from collections.abc import Sequence

import torch

from headinfer.engine.chunk import Chunk
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import ALL_HEADS, KV
from headinfer.plan.shape import LayerShape


class Layer:
    """A layer of a cache: one track, or two where some of its heads stream.

    Args:
        shape: of the layer.
        tracks: a ledger for each of `shape.tracks`.
        first_track: index of the first one among all tracks of the cache.
        torch_device: where keys, values and queries are.

    Attributes:
        tracks: the ledgers.
        first_track: index of the first one among all tracks of the cache.
        kv_heads: of all tracks together.
        streams: whether some of its heads stream.
        undivided: whether one track has all heads, of which none streams.
    """

    def __init__(
        self,
        shape: LayerShape,
        tracks: Sequence[Ledger],
        first_track: int,
        torch_device: torch.device,
    ) -> None:
        self.tracks = tuple(tracks)
        self.first_track = first_track
        self.kv_heads = shape.kv_heads
        self.streams = shape.streaming is not None
        self.undivided = len(self.tracks) == 1 and not self.streams
        self._heads: tuple[torch.Tensor, ...] = ()  # of each track, in the model's numbers
        if len(self.tracks) > 1:
            assert shape.streaming is not None
            streaming = shape.streaming.heads
            full = [head for head in range(self.kv_heads) if head not in streaming]
            self._heads = tuple(
                torch.tensor(heads, device=torch_device) for heads in (full, list(streaming))
            )
            self._order = torch.cat(self._heads)

    @property
    def tokens(self) -> int:
        """Tokens the layer holds, drafts included."""
        track = self.tracks[0]
        return track.tokens if track.draft is None else track.tokens + track.drafted_tokens

    @property
    def uneven(self) -> bool:
        """Whether a call ended between its tracks, so that only closing is left to do."""
        return len(self.tracks) > 1 and self.tokens != self.tracks[1].tokens

    def split(self, call: Chunk) -> tuple[Chunk, ...]:
        """Return a chunk for each track, with results of their own where there are two.

        All that is computed is on compute, and may be captured.
        """
        if not self._heads:
            if self.streams:  # all of its heads do
                call.window_tokens = self.tracks[0].track.window_tokens
            return (call,)
        query = call.query.index_select(1, self._order)  # whole groups
        keys, values = (part.index_select(1, self._order) for part in call.new)
        sinks = None if call.sinks is None else call.sinks.index_select(0, self._order)
        chunks, first = [], 0
        for ledger in self.tracks:
            heads = slice(first, first + ledger.track.kv_heads)
            first = heads.stop
            chunks.append(
                call.of_heads(
                    query[:, heads].flatten(1, 2),
                    KV(keys, values).cut(ALL_HEADS, heads),
                    None if sinks is None else sinks[heads],
                    ledger.track.window_tokens,
                )
            )
        return tuple(chunks)

    def join(self, call: Chunk, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Return the result of a call, in the model's order of heads, from those of its tracks."""
        for heads, chunk in zip(self._heads, chunks, strict=True) if self._heads else ():
            call.out.index_copy_(2, heads, chunk.out)
        return call.whole

    def split_new(self, new: KV) -> tuple[KV, ...]:
        """Return the keys and values of each track."""
        if not self._heads:
            return (new,)
        return tuple(KV(*(part.index_select(1, heads) for part in new)) for heads in self._heads)
