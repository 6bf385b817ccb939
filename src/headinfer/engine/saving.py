"""What an engine holds, page by page, for whoever keeps it elsewhere and brings it back.

Pages have the tokens of the tracks that keep all. Windows are a few tokens and are given at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from headinfer.engine.changes import ChangeableTokens
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.packed_here import pack_here, state_access, unpack_here
from headinfer.kv.extent import Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.plan.format import Format


class SavableTokens(ChangeableTokens):
    """A cache's tokens, which can be copied out of it and into another one."""

    @property
    def described_tracks(self) -> list[list[dict[str, Any]]]:
        """What each layer's tracks are, in numbers: an engine with the same can take their tokens.

        The heads that stream are named, as others have other tokens.
        """
        layers = zip(self._layers, self.plan.shape.attention_layers, strict=True)
        return [
            [
                {
                    "kv_heads": ledger.track.kv_heads,
                    "key_dim": ledger.geometry.key_dim,
                    "value_dim": ledger.geometry.value_dim,
                    "window_tokens": ledger.track.window_tokens,
                    "sink_tokens": ledger.track.sink_tokens,
                    "streaming_heads": list(shape.streaming.heads)
                    if shape.streaming is not None and ledger.track.window_tokens is not None
                    else [],
                }
                for ledger in layer.tracks
            ]
            for layer, shape in layers
        ]

    @property
    def full_tracks(self) -> list[int]:
        """Numbers of the tracks that keep all tokens."""
        return [number for number, ledger in enumerate(self._ledgers) if self._is_full(ledger)]

    @property
    def window_tracks(self) -> list[int]:
        """Numbers of the tracks with a window."""
        return [number for number, ledger in enumerate(self._ledgers) if not self._is_full(ledger)]

    def part_shapes(self, track: int, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of a track's keys and values, of some tokens."""
        geometry = self._ledgers[track].geometry
        rows = geometry.batch, geometry.kv_heads, tokens
        return (*rows, geometry.key_dim), (*rows, geometry.value_dim)

    def begin_saving(self) -> None:
        """Have the host hold all that `copy_page` copies, at rest; nothing may change until then.

        Raises:
            CacheStateError: the cache was closed, or a change of it was interrupted.
        """
        self._bring_home()

    def copy_page(self, start: int, into: Sequence[KV]) -> None:
        """Copy tokens out of each track that keeps all.

        Args:
            start: position of the first token.
            into: memory on the CPU for each of `full_tracks`, of as many tokens as are copied.
        """
        for track, place in zip(self.full_tracks, into, strict=True):
            ledger = self._ledgers[track]
            for stored in ledger.host_tiles(start, start + place.tokens):
                tile, part = in_memory(stored), place.cut(_places(stored, start))
                self._note_access(tile, write=False)
                if tile.format is not Format.DENSE:
                    unpack_here(tile, part)
                else:
                    _copy(part, tile.kv)

    def take_page(self, parts: Sequence[KV]) -> None:
        """Put tokens behind those of each track that keeps all.

        Args:
            parts: keys and values on the CPU for each of `full_tracks`; copied.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        with self.changing():
            for track, part in zip(self.full_tracks, parts, strict=True):
                ledger = self._ledgers[track]
                self._reserve(ledger, part.tokens)
                start = ledger.host_tokens
                end = start + part.tokens
                while ledger.host_tokens < end:
                    tokens = ledger.sent_at_once(end - ledger.host_tokens)
                    ledger.reserve(ledger.host_tokens + tokens)  # it may still be on its way
                    for tile in ledger.extend_host(tokens):
                        self._take(ledger, tile, part.cut(_places(tile, start)))

    def _take(self, ledger: Ledger, tile: Tile, new: KV) -> None:
        """Write tokens to host memory."""
        self._note_access(tile, write=True)
        if tile.format is not Format.DENSE:
            pack_here(self._device, ledger, tile, new)
        else:
            _copy(tile.kv, new)

    def end_loading(self) -> None:
        """Bring what the plan keeps there to the device, once all pages were taken."""
        if not self.parked:
            self._fill_residents()

    def copy_windows(self) -> Iterator[tuple[int, int, KV]]:
        """Yield the number of each track with a window, where it begins, and copies on the CPU."""
        for track in self.window_tracks:
            yield track, *self._windows.saved(self._ledgers[track])

    def take_window(self, track: int, start: int, kv: KV) -> None:
        """Have an empty track hold a window that `copy_windows` gave."""
        with self.changing():
            self._windows.restore(self._ledgers[track], start, kv)

    def _is_full(self, ledger: Ledger) -> bool:
        return ledger.track.window_tokens is None

    def _note_access(self, tile: Tile, *, write: bool) -> None:
        state_access(self._device, tile, write=write, purpose="a saved session")


def _copy(place: KV, source: KV) -> None:
    """Copy on the CPU in this thread alone.

    torch shares a copy among its threads, which wait for each other. On two cores that others used,
    too, it copied 0.5 GB/s, and one thread 50.
    """
    for to, part in zip(place, source, strict=True):
        # As bytes, because NumPy has no bfloat16.
        np.copyto(to.view(torch.uint8).numpy(), part.view(torch.uint8).numpy())


def _places(tile: Tile, start: int) -> slice:
    """Return where a tile's tokens are among those from `start` on."""
    first = tile.start - start
    return slice(first, first + tile.tokens)


def as_pairs(parts: Sequence[torch.Tensor]) -> list[KV]:
    """Return keys and values that follow one another as pairs."""
    return [KV(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
