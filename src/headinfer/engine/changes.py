"""Changes of what a cache holds, between the calls of its layers: cropping, rows, copies.

What changes or frees tokens of the host waits for the work in flight that touches them.
"""

import math
from collections.abc import Sequence

import torch

from headinfer.engine.moving import MovableTokens
from headinfer.engine.packed_here import copy_begun_page
from headinfer.engine.readout import Part, part_shape, read
from headinfer.errors import CacheStateError
from headinfer.kv.ledger import Ledger
from headinfer.plan.plan import Plan


class ChangeableTokens(MovableTokens):
    """A cache's tokens, which can be read, copied, cropped or rearranged."""

    def read_bytes(self, layer_idx: int, part: Part) -> int:
        """Return the bytes that `read` takes."""
        ledger = self._whole(layer_idx)
        return math.prod(part_shape(ledger, part)) * ledger.geometry.dtype.itemsize

    def read(self, layer_idx: int, part: Part) -> torch.Tensor:
        """Return a copy of a layer's keys or values, `[batch, kv_heads, tokens, dim]`.

        A window gives the past tokens that the next query sees.

        Returns:
            New memory on the device, which the caller owns. What was fetched ahead is forgotten.

        Raises:
            CacheStateError: some heads stream, so that not all hold the same tokens.
        """
        ledger = self._whole(layer_idx)
        self._come_to_rest()
        return read(self._device, ledger, part)

    def _whole(self, layer_idx: int) -> Ledger:
        """Return the ledger of a layer whose heads all hold the same tokens."""
        layer = self._layers[layer_idx]
        if layer.streams:
            raise CacheStateError(
                f"layer {layer_idx} has streaming heads, which keep their sinks and newest tokens "
                "alone, so that there are no keys and values of all heads to read"
            )
        return layer.tracks[0]

    def copy_from(self, other: "ChangeableTokens") -> None:
        """Hold what another engine of the same device and rows holds; this one must be empty.

        Either may be parked.

        The two share the host memory of what both hold, until one of them changes it.

        Raises:
            MemoryPlanError: the host memory cannot be had; close this engine then.
        """
        other._bring_home()
        other.go_on()  # nobody would do it for the one that stays
        for ledger, source in zip(self._ledgers, other._ledgers, strict=True):
            if source.track.window_tokens is None:
                ledger.share(source)
                copy_begun_page(self._device, ledger, source)
            elif source.tail is not None and self.parked:
                self._windows.park_copy(source, ledger, parked=other.parked)
            elif source.tail is not None and other.parked:
                tail = source.tail
                kv = tail.tile(tail.start, tail.end).kv
                self._windows.restore(ledger, tail.start, kv)
            elif source.tail is not None:
                self._windows.copy(source, ledger)
        self._lower_to(self.plan)
        if not self.parked:
            self._fill_residents()

    def check_crop(self, layer_idx: int, tokens: int) -> None:
        """Refuse to remove so many of a layer's newest tokens if its window has dropped the others.

        Raises:
            CacheStateError: it has.
        """
        self.check_no_drafts()
        layer = self._layers[layer_idx]
        if layer.uneven:
            self.lengths()  # refuses what was interrupted
        for ledger in layer.tracks:
            if ledger.track.window_tokens is not None:
                self._windows.check_crop(
                    ledger, max(ledger.tokens - tokens, 0), streams=layer.streams
                )

    @property
    def earliest_crop(self) -> int:
        """The fewest tokens, but for none, that each layer can be cropped to."""
        return max((ledger.earliest_crop for ledger in self._ledgers), default=0)

    def crop(self, layer_idx: int, tokens: int) -> None:
        """Remove a layer's newest `tokens` tokens, or all it has.

        Raises:
            CacheStateError: the cache was closed; or a window has dropped the tokens before those.
        """
        self._check_open()
        self.check_crop(layer_idx, tokens)
        for ledger in self._layers[layer_idx].tracks:
            if ledger.track.window_tokens is None and tokens > ledger.tail_tokens:
                self._come_to_rest()
            ledger.crop(max(ledger.tokens - tokens, 0))

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Make row `i` of a layer what row `rows[i]` was, for as many rows as the plan has."""
        self._check_open()
        assert len(rows) == self.plan.batch
        tracks = self._layers[layer_idx].tracks
        if any(ledger.track.window_tokens is None for ledger in tracks):
            self._come_to_rest()
        with self.changing():
            for ledger in tracks:
                if ledger.track.window_tokens is not None:
                    self._windows.select(ledger, rows)
                else:
                    self._pages.select(ledger, rows)
                    ledger.select_host(rows)

    def select_all(self, rows: Sequence[int], plan: Plan) -> None:
        """Make row `i` of every layer what row `rows[i]` was, under a plan for that many rows."""
        self._bring_home()
        with self.changing():
            self._choose_blocks(plan)
            for ledger in self._full:
                ledger.drop_device()
                ledger.select_host(rows)
            for ledger in self._ledgers:
                if ledger.track.window_tokens is not None:
                    self._windows.select(ledger, rows)
            self._rebuild(plan)
