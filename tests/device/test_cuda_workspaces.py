"""Captured products keep their workspace, whoever has torch forget workspaces; on a GPU."""

import pytest
import torch

import headinfer
from captured import NEW_KIND, launched, steps
from headinfer.device.cuda import CudaDevice
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu

_PLACE_BYTES = 2 * 2**20
"""More than torch gives from its memory for small tensors."""


def fill_what_is_free(stream: torch.cuda.Stream) -> list[torch.Tensor]:
    """Return memory that takes the place of whatever torch has free for a stream, and more."""
    with torch.cuda.stream(stream):
        filled = [
            torch.full((_PLACE_BYTES,), 7, dtype=torch.uint8, device="cuda") for _ in range(100)
        ]
    torch.cuda.synchronize()
    return filled


def test_a_replay_writes_to_no_memory_that_others_have_by_now() -> None:
    device = CudaDevice(torch.device("cuda"))
    left = torch.randn(8, 2**16, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(2**16, 64, device="cuda", dtype=torch.bfloat16)
    with device.apart():
        wanted = left @ right  # of many partial sums, which lie in the workspace
    capture = device.capture(lambda: left @ right)
    torch._C._cuda_clearCublasWorkspaces()
    others = fill_what_is_free(device._apart)
    for _ in range(3):
        assert torch.equal(capture.replay(), wanted)
    torch.cuda.synchronize()
    assert all(bool((other == 7).all()) for other in others)


def test_steps_stay_right_beside_graphs_of_torchs_compiler() -> None:
    model, other = tiny_model("llama3").to("cuda", torch.bfloat16), torch.nn.Linear(64, 64).cuda()
    compiled = torch.compile(other, mode="reduce-overhead")
    new, outputs = {"input_ids": torch.full((1, 1), 5, device="cuda")}, []
    for capture in (False, True):
        with headinfer.attach(model, resident_tokens="all", capture=capture, fuse="off") as offload:
            cache, found = offload.new_cache(), []
            model(random_tokens(1, 40).cuda(), past_key_values=cache)
            for _ in range(6):
                found += steps(model, cache, 4, **new)
                with torch.no_grad():
                    compiled(torch.randn(4, 64, device="cuda"))  # warms up, records, and replays
                torch.cuda.empty_cache()
            outputs.append(torch.stack(found))
    assert launched(offload.stats) == NEW_KIND
    assert torch.equal(*outputs)
