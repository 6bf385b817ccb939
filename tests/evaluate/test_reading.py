"""Texts read pass by pass, by two models with one set of weights."""

import itertools

import pytest
import torch
from transformers.cache_utils import DynamicCache

import headinfer
from headinfer.errors import ModelLoadError, UnsupportedModelError
from headinfer.evaluate import reading
from headinfer.evaluate.reading import aligned, check_text, most_tokens, read, sharing_weights
from tiny_models import random_tokens, shared_model, tiny_model


def passes(whole: torch.Tensor, size: int):
    return iter(whole.split(size))


@pytest.mark.parametrize("sizes", [(7, 3), (3, 7), (5, 5), (1, 23), (23, 23), (100, 4), (6, 4, 9)])
def test_aligned_parts_are_the_same_positions(sizes: tuple[int, ...]) -> None:
    whole = torch.arange(23).unsqueeze(1)
    ends = {end for size in sizes for end in (*range(size, 23, size), 23)}
    parts = list(aligned([passes(whole, size) for size in sizes]))
    assert len(parts) == len(ends)
    for number in range(len(sizes)):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole)
    for part in parts:
        assert all(torch.equal(part[0], other) for other in part)


def test_readings_of_different_lengths_are_an_error() -> None:
    with pytest.raises(AssertionError, match="different lengths"):
        list(aligned([passes(torch.zeros(6, 1), 3), passes(torch.zeros(3, 1), 3)]))


@pytest.mark.parametrize("pass_tokens", [1000, 64, 7])
def test_a_reading_has_the_logits_of_one_call(pass_tokens: int) -> None:
    model, tokens = shared_model("gemma3"), random_tokens(1, 64)
    expected = model(tokens).logits[0]
    found = list(read(model, DynamicCache(config=model.config), tokens, pass_tokens))
    assert [len(part) for part in found[:-1]] == [pass_tokens] * (len(found) - 1)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=1e-4)


def test_a_pass_keeps_its_logits_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("llama3")
    monkeypatch.setattr(reading, "LOGITS_BYTES", 97 * 4 * 12 + 1)
    assert most_tokens(model) == 12
    monkeypatch.setattr(reading, "LOGITS_BYTES", 1)
    assert most_tokens(model) == 1


def test_a_second_instance_shares_weights_and_nothing_else() -> None:
    model = tiny_model("gemma3")
    other = sharing_weights(model)
    tensors = [
        dict(itertools.chain(each.named_parameters(), each.named_buffers()))
        for each in (model, other)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[0][name] is tensors[1][name] for name in tensors[0])
    assert not {map(id, model.modules())} & {map(id, other.modules())}
    before = model.config._attn_implementation
    with headinfer.attach(other, device="simulated"):
        assert other.config._attn_implementation != before
        assert model.config._attn_implementation == before
        assert "forward" not in vars(model)


def test_texts_that_stock_cannot_read_in_parts_are_refused() -> None:
    dynamic = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 10000.0,
    }
    model = tiny_model("llama3", rope_parameters=dynamic)
    with pytest.raises(UnsupportedModelError, match="rotary frequencies follow"):
        check_text(model, random_tokens(1, 30))
    model = tiny_model("llama3")
    model.config.output_hidden_states = True
    with pytest.raises(UnsupportedModelError, match="output_hidden_states"):
        check_text(model, random_tokens(1, 30))


def test_tokens_that_the_model_lacks_are_told() -> None:
    model = shared_model("llama3")
    check_text(model, torch.tensor([[3, 96]]))
    with pytest.raises(ModelLoadError, match="token 97 in the text, and the model knows 97"):
        check_text(model, torch.tensor([[3, 97]]))
