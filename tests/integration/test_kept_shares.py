"""What one cache has settled on of the CPU's share is where another of the attachment begins."""

import pytest
import torch

import headinfer
from headinfer.engine.balance import Settled
from headinfer.integration import parts
from headinfer.plan.format import Format
from measurements import WITH_GPU
from tiny_models import random_tokens, tiny_model


def test_caches_of_an_attachment_begin_with_the_share_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A share that nothing was kept of is the plan's; one of another context is not believed."""
    monkeypatch.setattr(parts, "measured_hardware", lambda *_args: WITH_GPU.hardware)
    model = tiny_model("llama3")
    options = {"tile_heads": 1, "tile_tokens": 16, "resident_tokens": 0}
    with headinfer.attach(model, device="simulated", **options) as offload:

        def attended(tokens: int) -> int:
            before = offload.stats.bytes_attended_on_host
            model.generate(random_tokens(1, tokens), max_new_tokens=2, do_sample=False)
            return offload.stats.bytes_attended_on_host - before

        first, kept = attended(320), offload.session.parts[0].shares
        kept.keep(
            ((1, torch.float32, Format.DENSE), 0),
            320,
            Settled(offload.plan.host_share / 4, host_s=1e-3),
        )
        assert attended(320) == pytest.approx(first / 4, rel=0.2)
        kept.keep(((1, torch.float32, Format.PACKED), 0), 320, Settled(1e-3, host_s=1e-3))
        assert attended(320) == pytest.approx(first / 4, rel=0.2)  # as dense tokens are attended
        assert attended(1600) == pytest.approx(first * 5, rel=0.2)
