"""Changes of what a cache holds, between the calls of its layers: cropping, rows, plans, copies.

What changes or frees tokens of the host waits for the work in flight that touches them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch

from headinfer.engine.held import HeldTokens
from headinfer.engine.packed_here import copy_begun_page
from headinfer.engine.readout import Part, part_shape, read
from headinfer.errors import CacheStateError, DiskError, MemoryPlanError
from headinfer.kv.ledger import Ledger
from headinfer.plan.disk_blocks import LEAST_BLOCKS
from headinfer.plan.narrow import for_prompts, without_residents
from headinfer.plan.plan import Plan


class ChangeableTokens(HeldTokens):
    """A cache's tokens, which can be read, copied, cropped, rearranged or planned anew."""

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

    def settle_writes(self) -> None:
        """Wait for writes to the disk, before a change that must not stop half-way.

        Raises:
            DiskError: one failed, and nobody was told. Its tokens are still in memory.
        """
        self._place.settled()
        self._check_open()

    def _come_to_rest(self) -> None:
        self._check_open()
        self.check_no_drafts()
        self._settle()
        self.settle_writes()

    def go_on(self) -> None:
        """Write to the disk anew what failed, before a call of the model changes anything.

        Raises:
            DiskError: it fails again, or failed and nobody was told.
        """
        if self._place.under_way:
            self._place.go_on()

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

    def replan(self, plan: Plan) -> None:
        """Go on under another plan for as many rows, with what it keeps on the device."""
        self._bring_home()
        self._rebuild(plan)

    def begin_answer(self, plan: Plan) -> bool:
        """Go on under a plan for an answer where the device has its memory, and else as before.

        Returns:
            Whether the device has it.
        """
        before = self.plan
        try:
            self._bring_home()
        except (DiskError, MemoryPlanError):  # for what a step might still do without
            return False
        self._rebuild(plan, before, without_residents(before))
        return self.plan is plan

    def end_answer(self) -> None:
        """Go back to the plan for prompts, where this one is for an answer.

        Without residents where the device has no memory for these any more.
        """
        if self.plan.prompt_plan is not None:
            self._bring_home()
            self._rebuild(for_prompts(self.plan), without_residents(self.plan))

    def park(self) -> None:
        """Give up the arena and host memory that is not needed; `replan` brings an arena back.

        Windows wait in memory of the CPU.
        """
        if self.parked:
            return
        self._bring_home()
        self._forget_memory()
        for ledger in self._ledgers:
            if ledger.track.window_tokens is not None:
                self._windows.park(ledger)
            else:
                ledger.drop_device()
                ledger.trim()
        self._forget_raw()
        self._expected_tokens = 0
        self._leave_arena()
        self._arena_bytes = 0
        self.parked = True

    def _forget_raw(self) -> None:
        """Let go of memory for pages that do not pack, as far as there are none."""
        if self._raw is None:
            return
        if not any(ledger.host_tokens for ledger in self._full):
            self._raw = None
            return
        unused = self._raw.forget_unused()
        for ledger in self._full:
            ledger.forget_raw(unused)

    def compact(self) -> None:
        """Copy what a parked cache holds, where that is a small part of the memory it holds.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        assert self.parked
        for ledger in self._full:
            ledger.trim()
            if self.plan.disk_block_tokens:
                continue  # blocks stay whole; others have them written to the disk
            if ledger.host_bytes > 2 * ledger.home.num_bytes(ledger.host_tokens):
                ledger.select_host(range(self.plan.batch), anew=True)

    @property
    def can_change(self) -> bool:
        """Whether its plan can, on behalf of others: its own next call is told of what failed."""
        return not (self.closed or self.drafting or self.interrupted) and self._host.failure is None

    def lower_blocks(self) -> bool:
        """Keep half of the blocks above a disk in memory; return whether they could be fewer.

        With the fewest there is no memory for blocks that are being written.

        Raises:
            DiskError: the disk has no room for the others.
        """
        plan = self.plan
        blocks = max(plan.disk_host_blocks // 2, LEAST_BLOCKS)
        staging_bytes = plan.disk_staging_bytes if blocks > LEAST_BLOCKS else 0
        lower = blocks < plan.disk_host_blocks or staging_bytes < plan.disk_staging_bytes
        if not lower:
            return False
        if not self.can_change or not self._place.settled():
            return False
        self.keep_blocks(min(blocks, plan.disk_host_blocks), staging_bytes)
        return True

    def keep_blocks(self, blocks: int, staging_bytes: int) -> None:
        """Have so many blocks above a disk in memory from now on.

        Args:
            blocks: of each layer.
            staging_bytes: of memory for those that are being written.

        Raises:
            DiskError: the disk has no room for the others.
        """
        self._come_to_rest()
        plan = dataclasses.replace(
            self.plan, disk_host_blocks=blocks, disk_staging_bytes=staging_bytes
        )
        self._lower_to(plan)
        self._place.free()
        self.plan = plan

    def _lower_to(self, plan: Plan) -> None:
        """Have no more blocks in memory than a plan says, at rest; where that fails stay as before.

        Raises:
            DiskError: the disk has no room for the others.
        """
        self._choose_blocks(plan)
        try:
            for ledger in self._full:
                ledger.lower_blocks()
        except DiskError:
            self._choose_blocks(self.plan)
            raise

    def forget_ahead(self) -> None:
        """Forget what was fetched ahead, as the disk may have failed there, too."""
        if not (self.parked or self.closed):
            self._executor.source.drop()

    def give_up_residents(self) -> None:
        """Keep no token on the device, unless something failed; costs no copy but the tail's."""
        if self.can_change and self._place.settled():
            self.replan(without_residents(self.plan))

    def _bring_home(self) -> None:
        """Have the host hold every token of the layers without a window, at rest."""
        self.lengths()  # refuses what was interrupted
        self.check_no_drafts()
        if self.parked:
            return
        for ledger in self._full:
            self._pages.send_home(ledger)
        self._come_to_rest()

    def _rebuild(self, plan: Plan, *otherwise: Plan) -> None:
        """Take the memory of another plan; the host must hold every token, at rest.

        Args:
            plan: of as many rows.
            *otherwise: to be tried one after the other where there is no memory for the one before.
        """
        self._lower_to(plan)
        self.plan = plan
        self._forget_memory()
        # The old arena goes before the new one comes: both together would exceed either plan.
        for ledger in self._full:
            ledger.drop_device()
        try:
            self._leave_arena()
            if self._arena_bytes not in (0, plan.arena_bytes):
                self._device.give_back_unused()  # the old arena, which the new one cannot use
            self._build_one_of(plan, *otherwise)
        except BaseException:
            self._abandon()
            raise
        if self.parked:
            self.parked = False
            for ledger in self._ledgers:
                if ledger.track.window_tokens is not None:
                    self._windows.wake(ledger)
        self._fill_residents()

    def _build_one_of(self, *plans: Plan) -> None:
        """Take the memory of the first plan that there is memory for."""
        for plan in plans[:-1]:
            self.plan = plan
            with contextlib.suppress(MemoryPlanError):
                self._build()
                return
            for ledger in self._full:  # out of what was had of it
                ledger.drop_device()
        self.plan = plans[-1]
        self._build()

    def _fill_residents(self) -> None:
        """Fetch what the plan keeps on the device; the host must hold every token, at rest."""
        for ledger in self._full:
            self._pages.fill_residents(ledger)
