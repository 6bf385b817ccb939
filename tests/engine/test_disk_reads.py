"""How much decode steps read from the disk: each tile once, in whatever step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from above_disk import TOKENS, attached
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile
from tiny_models import random_tokens


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the bytes of all reads so far, those included that nobody waits for."""
    read, sizes = SpillFile.read, [0]

    def counted(self: SpillFile, offset: int, into: torch.Tensor) -> Any:
        sizes[0] += into.nbytes
        return read(self, offset, into)

    monkeypatch.setattr(SpillFile, "read", counted)
    return sizes


@pytest.mark.parametrize(
    ("options", "passed"),
    [({}, 1), ({"resident_tokens": 64}, 1), ({"draft_tokens": 96}, 3)],
    ids=["steps", "residents", "verifying"],
)
def test_a_pass_reads_what_is_on_the_disk_once(
    model: PreTrainedModel, tmp_path: Path, begun: list[int], options: dict[str, Any], passed: int
) -> None:
    prompt = random_tokens(1, TOKENS)
    with attached(model, tmp_path, device=SimulatedDevice(), **options) as offload:
        cache = offload.new_cache(TOKENS + 9)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        engine = cache.state.engine
        model(prompt[:, :passed], past_key_values=cache)  # from here on the next pass is known
        for at in range(5):
            before, waited = begun[0], offload.stats.bytes_from_disk
            with cache.verifying():
                model(prompt[:, at : at + passed], past_key_values=cache)
            below = engine.disk_tokens - engine.plan.resident_tokens
            expected = engine.plan.shape.host_kv_bytes(below)
            assert (begun[0] - before, offload.stats.bytes_from_disk - waited) == (
                expected,
                expected,
            )
        cache.close()


def test_drafts_are_captured_while_steps_read_the_disk(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    prompt = random_tokens(1, TOKENS)
    with attached(model, tmp_path, device=SimulatedDevice(), draft_tokens=96) as offload:
        cache = offload.new_cache(TOKENS + 20)
        model(prompt, past_key_values=cache, logits_to_keep=1)
        for at in range(3):
            with cache.drafting():
                for draft in range(3):
                    model(prompt[:, at + draft : at + draft + 1], past_key_values=cache)
            with cache.verifying():
                model(prompt[:, :2], past_key_values=cache)
        assert offload.stats.captured_drafts > 0
        assert offload.stats.bytes_from_disk > 0
        assert not offload.stats.captured_steps
        assert not offload.stats.captured_verifications
        cache.close()
