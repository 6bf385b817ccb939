"""Random keys and values with the exponents of real models, and caches filled with them."""

import json
from collections import Counter
from importlib import resources

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.bench.fill import fill_randomly
from headinfer.bench.recorded import recorded_values
from headinfer.packed.layout import WINDOW, PageLayout
from headinfer.packed.reference import overflowed, pack
from tiny_models import tiny_model

ROWS = json.loads(resources.files("headinfer.bench").joinpath("exponents.json").read_text())["rows"]


@pytest.mark.parametrize("part", ["keys", "values"])
def test_exponents_are_as_recorded_and_pages_pack(part: str) -> None:
    """Each kind of layer takes its turn; no page overflows, as none of the models' did."""
    kinds = [row for row in ROWS if row["part"] == part]
    for layer, row in enumerate(kinds):
        shape = (1, 32, 256, 64)
        drawn = [
            recorded_values(shape, part, number, torch.bfloat16, torch.Generator().manual_seed(3))
            for number in (layer, layer + len(kinds))
        ]
        assert torch.equal(*drawn)
        pages, layout = pack(drawn[0]), PageLayout(64)
        assert not overflowed(pages, 64).any()
        exponents = (drawn[0].view(torch.int16) >> 7 & 0xFF).view(1, 32, -1, layout.values)
        bases = pages[..., layout.header_at + 2, None].int()
        outside = (exponents > 0) & ((exponents <= bases) | (exponents > bases + WINDOW))
        assert outside.float().mean() == pytest.approx(row["escapes_share"], rel=0.5)
        zeros = row["zeros"] / (row["zeros"] + sum(row["offsets"].values()))
        assert (exponents == 0).float().mean() == pytest.approx(zeros, rel=0.2)
        mean = sum(int(base) * count for base, count in row["bases"].items()) / row["pages"]
        assert bases.float().mean() == pytest.approx(mean, abs=0.7)
        frequent, _ = Counter(row["offsets"]).most_common(1)[0]
        offsets = (exponents - bases).flatten()
        assert abs(int(offsets.mode().values) - int(frequent)) <= 1


def test_other_dtypes_have_the_same_values() -> None:
    drawn = [
        recorded_values((1, 2, 9, 16), "keys", 0, dtype, torch.Generator().manual_seed(1))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert drawn[1].dtype is torch.float32
    assert torch.equal(drawn[0].float(), drawn[1])


def test_a_cache_is_filled_with_them_alike_for_each_method() -> None:
    model = tiny_model("llama3")
    stock, normal = DynamicCache(config=model.config), DynamicCache(config=model.config)
    fill_randomly(model, stock, 50, seed=1, recorded=True)
    fill_randomly(model, normal, 50, seed=1)
    with headinfer.attach(model, device="simulated") as offload:
        ours = offload.new_cache()
        fill_randomly(model, ours, 50, seed=1, recorded=True)
        for one, other, third in zip(ours, stock, normal, strict=True):
            for part in (0, 1):
                assert torch.equal(one[part], other[part])
                assert not torch.equal(one[part], third[part])
