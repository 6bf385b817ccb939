"""A Gemma-2 whose scores the Triton programs bound, as on a GPU, against stock eager attention."""

import importlib.util
from typing import Any

import pytest
import torch

import headinfer
from captured import generated, stock_generated
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.engine.ready import Form
from headinfer.integration import attention
from tiny_models import random_tokens, tiny_model

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.attend.fused_chunk import TritonChunks
from headinfer.attend.fused_decode import TritonKernels

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them by itself"),
    pytest.mark.usefixtures("patch_once"),
]

PROMPT, NEW_TOKENS = 43, 12
PLACEMENTS: dict[str, dict[str, Any]] = {
    "resident": {"resident_tokens": "all", "chunk_tokens": 17},
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 20, "chunk_tokens": 30},
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Kernels]:
    """The tables that were made, of a GPU's programs in Triton's interpreter."""
    made: list[Kernels] = []

    def tables(_device: Any, _dtype: Any, key_dim: int, value_dim: int, softcap: Any) -> Kernels:
        assert (key_dim, softcap) == (value_dim, 2.0)
        chunks = TritonChunks(key_dim, 6, 0, softcap)
        kernels = TritonKernels([chunks], [ReferenceKernel(softcap)], 6, softcap=softcap)
        kernels.find_band = lambda: chunks.band
        made.append(kernels)
        return kernels

    monkeypatch.setattr(attention, "select_kernels", tables)
    return made


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_generation_equals_stock(
    batch: int, placement: str, interpreted: list[Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, windows, tiles and steps, in one launch where all tokens are resident."""
    model, tokens = tiny_model("gemma2", head_dim=16), random_tokens(batch, PROMPT)
    stock = stock_generated(model, tokens, max_new_tokens=NEW_TOKENS)

    def asked(*_given: object) -> None:
        raise AssertionError("the unfused kernel was asked")

    monkeypatch.setattr(ReferenceKernel, "attend", asked)
    options = {**PLACEMENTS[placement], "device": "simulated"}
    with headinfer.attach(model, **options) as offload:
        cache = offload.new_cache()
        ours = generated(model, tokens, cache, max_new_tokens=NEW_TOKENS)
        forms = {form for _, form in cache.state.engine.captured}
    assert interpreted
    assert forms == {Form.ONE_LAUNCH if placement == "resident" else Form.IN_PIECES}
    assert torch.equal(ours.sequences, stock.sequences)
    wanted = torch.stack(stock.logits)
    error = (torch.stack(ours.logits) - wanted).abs().max() / wanted.abs().max()
    assert error < 1e-5
    assert offload.stats.captured_steps >= NEW_TOKENS - 5
