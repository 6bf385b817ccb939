"""Random changes of caches above a disk: what the same changes give without one."""

import contextlib
import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from above_disk import SETTINGS
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import MemoryPlanError
from headinfer.integration.memory_held import held_together
from parted import spread
from tiny_models import random_tokens

MOST_TOKENS = 900
HELD_KIB = 1500
SPREAD_KIB = 1170, 1250, 1700
"""Of two devices, each of which needs some for what it reads: three caches then have the least."""


class Run:
    """A run of random changes, of up to three caches; the same for a seed, with a disk and without.

    Above a disk one seed in three has each layer on a device of its own.

    Args:
        model: attached.
        folder: of the disk; None for a run without one.
        seed: of the changes.
        saved: a folder for sessions.

    Attributes:
        moved: whether tiles may differ: those of copies and of what is compacted lie otherwise.
            Where a choice of rows is refused, the newest tokens have been sent home.
    """

    def __init__(self, model: PreTrainedModel, folder: Path | None, seed: int, saved: Path) -> None:
        self.random, self.saved, self.moved = random.Random(seed), saved, False
        self.model, self.rows = model, self.random.choice((1, 1, 2))
        several = seed % 3 == 2
        memory = self.random.choice(SPREAD_KIB if several else (600, 900, HELD_KIB)) * self.rows
        self.limit_bytes = None if folder is None else memory * 1024
        self.devices = [SimulatedDevice(seed=seed)] * 2
        if several and folder is not None:
            self.devices = spread(0, 1, seed=seed)
        self.options: dict[str, Any] = {
            "disk_cache": folder,
            "host_memory": None if folder is None else f"{memory}KiB",
            "resident_tokens": self.random.choice((0, 0, 64)),
            "overlap": self.random.random() < 0.7,
            "draft_tokens": self.random.choice((0, 96)) if self.rows == 1 else 0,
        }
        self.caches: list[Any] = []
        often = [self.extend, self.crop] * 2
        self.changes = [*often, self.copy, self.choose, self.park, self.draft]
        self.changes += [] if several else [self.save]  # split models have no sessions

    def outputs(self, changes: int) -> Iterator[torch.Tensor]:
        """Yield what the model gives after each change."""
        offload = headinfer.attach(
            self.model, simulated_device=self.devices, **{**SETTINGS, **self.options}
        )
        with offload, torch.inference_mode():
            self.offload = offload
            self.caches.append(offload.new_cache(MOST_TOKENS))
            yield self.extended(0, self.random.randrange(300, 700))
            for _ in range(changes):
                at = self.random.randrange(len(self.caches))
                self.random.choice(self.changes)(at)
                yield self.extended(at, self.random.choice((1, 3, 9, 60, 130)))
                if self.limit_bytes is not None:
                    assert held_together(self.caches) <= self.limit_bytes
            self.caches.clear()
        for device in self.devices:
            device.memory.check()

    def extended(self, at: int, tokens: int) -> torch.Tensor:
        cache = self.caches[at]
        held = cache.get_seq_length()
        if held + tokens > MOST_TOKENS:
            cache.crop(self.random.randrange(MOST_TOKENS // 2) - held)
        prompt = random_tokens(self.rows, tokens)
        return self.model(prompt, past_key_values=cache, logits_to_keep=2).logits

    def extend(self, at: int) -> None:
        self.extended(at, self.random.randrange(1, 200))

    def crop(self, at: int) -> None:
        cache = self.caches[at]
        held = cache.get_seq_length()
        cache.crop(self.random.choice((0, 1, held // 3, held - 1, held * 3 // 4)) - held)

    def draft(self, at: int) -> None:
        cache = self.caches[at]
        if cache.can_draft is None:
            with cache.drafting():
                self.model(random_tokens(1, 1), past_key_values=cache)

    def copy(self, at: int) -> None:
        if len(self.caches) < 3:
            self.moved = True
            self.caches.append(copy.deepcopy(self.caches[at]))
        else:
            self.caches.pop((at + 1) % 3).close()
            self.caches.insert((at + 1) % 3, self.offload.new_cache(MOST_TOKENS))

    def choose(self, at: int) -> None:
        cache = self.caches[at]
        if not cache.get_seq_length():
            return
        rows = [self.random.randrange(self.rows) for _ in range(self.rows)]
        cache.reorder_cache(torch.tensor(rows))
        if self.random.random() < 0.5:
            self.moved = True
            with contextlib.suppress(MemoryPlanError):  # there may be too little for all these
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.arange(self.rows) * 2)

    def park(self, at: int) -> None:
        self.caches[at].park()
        if self.random.random() < 0.5:
            self.moved = True
            for part in self.caches[at].state.engine.parts:
                part.compact()

    def save(self, at: int) -> None:
        if self.caches[at].get_seq_length():
            self.caches[at].save(self.saved / "session")
            self.caches.pop(at).close()
            loaded: Any = self.offload.load_cache(self.saved / "session", max_tokens=MOST_TOKENS)
            self.caches.insert(at, loaded)


@pytest.mark.covering(most=3)
@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 100))]
)
def test_random_changes(model: PreTrainedModel, tmp_path: Path, seed: int) -> None:
    with_disk = Run(model, tmp_path, seed, tmp_path)
    wanted = list(Run(model, None, seed, tmp_path).outputs(8))
    for ours, its in zip(with_disk.outputs(8), wanted, strict=True):
        if with_disk.moved:
            torch.testing.assert_close(ours, its, rtol=0, atol=1e-5)
        else:
            assert torch.equal(ours, its)
