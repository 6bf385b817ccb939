"""Changes of the plan that a cache's tokens lie under, and of the memory that they lie in.

What frees tokens of the host, or moves them, waits for the work in flight that touches them.
"""

import contextlib
import dataclasses

from headinfer.engine.held import HeldTokens
from headinfer.errors import DiskError, MemoryPlanError
from headinfer.plan.disk_blocks import LEAST_BLOCKS
from headinfer.plan.narrow import for_prompts, without_residents
from headinfer.plan.plan import Plan


class MovableTokens(HeldTokens):
    """A cache's tokens, which can go on under another plan, in more memory or less."""

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

    def give_up_residents(self) -> None:
        """Keep no token on the device, unless something failed; costs no copy but the tail's."""
        if self.can_change and self._place.settled():
            self.replan(without_residents(self.plan))

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

    def forget_ahead(self) -> None:
        """Forget what was fetched ahead, as the disk may have failed there, too."""
        if not (self.parked or self.closed):
            self._executor.source.drop()

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
