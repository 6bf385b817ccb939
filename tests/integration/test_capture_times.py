"""What captures take, beside what decode steps do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from captured import SIMULATED, prompted, steps
from headinfer.cli.render import link_bytes_per_s, stats_as_json, summary_rows
from headinfer.integration import captured_step, serving
from tiny_models import tiny_model

LAUNCHED, COMPARED = 1, 1
PREPARED, CAPTURED = 1, 1


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A model each call of which takes a second. A replay, which does not call it, takes none."""
    model = tiny_model("llama3")
    passed = [0.0]
    original = model.lm_head.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        passed[0] += 1.0
        return original(hidden)

    clock: Callable[[], float] = lambda: passed[0]  # noqa: E731
    model.lm_head.forward = forward
    monkeypatch.setattr(captured_step, "perf_counter", clock)
    monkeypatch.setattr(serving.time, "perf_counter", clock)
    return model


def shown(stats: headinfer.Stats, plan: Any) -> dict[str, str]:
    return dict(summary_rows(stats, plan))


@pytest.mark.parametrize("placement", [{}, {"resident_tokens": 0}], ids=["one launch", "in pieces"])
def test_captures_are_no_part_of_decoding(
    placement: dict[str, Any], model: PreTrainedModel
) -> None:
    with headinfer.attach(model, **{**SIMULATED, **placement}) as offload:
        cache = prompted(offload, model)
        steps(model, cache, 1)
        assert "captures" not in shown(cache.stats, offload.plan)
        steps(model, cache, 7)
        for stats in (cache.stats, offload.stats):
            assert (stats.prefill_s, stats.decode_s) == (1, LAUNCHED + LAUNCHED + COMPARED)
            assert stats.capture_s == PREPARED + CAPTURED
            assert stats.decode_tokens_per_s == 8 / 3
        told = shown(stats, offload.plan)
        assert told["decode"] == "8 tokens in 3.0 s, 2.7 tokens/s"
        assert told["captures"] == "1 decode step in 2.0 s, not in decode"
        assert stats_as_json(stats)["capture_s"] == 2
        copied = stats.bytes_to_device + stats.bytes_to_host
        assert link_bytes_per_s(stats) == copied / 6
        steps(model, prompted(offload, model), 4)
        assert offload.stats.decode_s == 3 + LAUNCHED + COMPARED
        assert offload.stats.capture_s == 2 + CAPTURED
        assert shown(offload.stats, offload.plan)["captures"].startswith("2 decode steps in 3.0 s")
