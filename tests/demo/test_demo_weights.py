"""The margins that the construction promises, from the model's own float32 frequencies."""

import pytest
import torch

from headinfer.demo import layout
from headinfer.demo.codes import codebook

LEAST_MARGIN_NATS = 18


def largest_dot_product(codes: list[list[float]]) -> float:
    matrix = torch.tensor(codes)
    return float((matrix @ matrix.T - 2 * torch.eye(len(codes))).max())


def test_codebooks_keep_their_distance():
    assert largest_dot_product(codebook(48, 7, 2)) == pytest.approx(3 / 7)
    assert largest_dot_product(codebook(101, 12, 4)) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="only 16"):
        codebook(17, 7, 3)


def test_near_heads_prefer_their_distance_to_every_other(model):
    turns = model.model.rotary_emb.inv_freq[: len(layout.SHARES)].double()
    shares = torch.tensor(layout.SHARES, dtype=torch.float64)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-3)
    distances = torch.arange(1, layout.MAX_TOKENS, dtype=torch.float64)
    gaps = layout.AMPLITUDE * ((1 - torch.cos(distances[:, None] * turns)) @ shares)
    assert float(gaps.min()) >= 27
    # All other positions of the longest text together.
    assert float(torch.exp(-gaps).sum()) < 1e-6


def test_still_dimensions_stand_still(model):
    assert float(model.model.rotary_emb.inv_freq[len(layout.SHARES)]) * (131072 + 4096) < 0.05


def test_number_heads_margins():
    right = 2 * layout.MATCH + layout.KIND
    half_right = (1 + layout.HALF_MATCH) * layout.MATCH + layout.KIND
    wrong_class = 2 * layout.MATCH
    assert right - layout.BEGIN_SCORE >= LEAST_MARGIN_NATS
    assert layout.BEGIN_SCORE - half_right >= LEAST_MARGIN_NATS
    assert layout.BEGIN_SCORE - wrong_class >= LEAST_MARGIN_NATS


def test_every_norm_is_the_constant_it_was_built_for(model, tokenizer):
    from headinfer.demo import make_document

    ids = torch.tensor([tokenizer(make_document(1024).text)["input_ids"]])
    norms = {}

    def record(name):
        return lambda module, args: norms.__setitem__(
            name, (args[0].square().mean(-1).sqrt(), module.weight)
        )

    hooks = [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if "norm" in name
    ]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    assert len(norms) == 5
    for rms, weight in norms.values():
        # The first tokens have nothing to look at.
        torch.testing.assert_close(
            rms[0, 6:], weight[0].expand(rms[0, 6:].shape), rtol=1e-4, atol=0
        )
