"""What a cache is asked wrongly is told in a line and changes nothing; what it shows is short."""

import copy
from typing import Any

import pytest
import torch

import headinfer
from headinfer.errors import OptionError, SessionFileError
from tiny_models import random_tokens, shared_model, tiny_model

WRONG = {
    "text": "hello",
    "nothing": None,
    "bytes": b"hi",
    "words": ["a", "b"],
    "fractions": [1.5, 2.0],
    "a tensor of fractions": torch.full((9,), 0.5),
    "two rows": torch.ones(2, 9, dtype=torch.long),
    "a number": 5,
    "what a tokenizer returns": {"input_ids": [1, 2]},
    "truths": [True, False],
}


@pytest.mark.parametrize("ids", WRONG.values(), ids=WRONG)
def test_a_cache_stays_where_ids_are_none(ids: Any) -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 20)
    with headinfer.attach(model, device="cpu") as offload, torch.no_grad():
        cache = offload.new_cache()
        model(tokens, **cache.as_keyword())
        with pytest.raises(OptionError, match="ids must be the token ids of one prompt") as raised:
            cache.keep_common_prefix(ids)
        assert len(str(raised.value).splitlines()) == 1
        assert cache.get_seq_length() == 20
        for right in (tokens, tokens[0].tolist(), tokens.numpy(), tokens.int()):
            assert cache.keep_common_prefix(right) == 19


@pytest.mark.parametrize("path", [None, 3, b"x", ["x"]], ids=repr)
def test_a_session_has_a_path(path: Any) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device="cpu") as offload, torch.no_grad():
        cache = offload.new_cache()
        model(random_tokens(1, 20), **cache.as_keyword())
        for ask in (cache.save, offload.load_cache):
            with pytest.raises(SessionFileError, match="a session is a folder, given as a path"):
                ask(path)
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_a_cache_shows_is_a_line(device: str) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device=device) as offload, torch.no_grad():
        cache = offload.new_cache()
        assert repr(cache) == "OffloadedCache(no tokens, 3 layers)"
        model(random_tokens(1, 20), **cache.as_keyword())
        assert repr(cache).startswith("OffloadedCache(20 tokens, 3 layers, ")
        assert ("of GPU memory" in repr(cache)) == (device == "simulated")
        rows = offload.new_cache()
        model(random_tokens(2, 20), **rows.as_keyword())
        assert repr(rows).startswith("OffloadedCache(20 tokens in each of 2 rows, 3 layers, ")
        cache.close()
        assert repr(cache) == "OffloadedCache(closed)"
    assert repr(rows) == "OffloadedCache(closed)"


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_an_attachment_shows_is_a_line(device: str) -> None:
    model = tiny_model("llama3", head_dim=16)
    form = "dense" if device == "cpu" else "int8"
    options = {} if device == "cpu" else {"kv_cache": "int8"}
    start = f"Offload({type(model).__name__}, attached, {form} KV cache with "
    with headinfer.attach(model, device=device, **options) as offload, torch.no_grad():
        assert repr(offload) == start + "0 B of CPU memory)"
        cache = offload.new_cache()
        model(random_tokens(1, 200), **cache.as_keyword())
        held = repr(cache).split("layers, ")[1]
        assert repr(offload) == start + held
        assert ("of GPU memory" in held) == (device == "simulated")
        fork = copy.deepcopy(cache)  # refers to the same CPU memory, which counts once
        assert repr(fork).split("layers, ")[1].split(", ")[0] in repr(offload)
        cache.close()
        fork.close()
        assert repr(offload) == start + "0 B of CPU memory)"
    assert repr(offload) == f"Offload({type(model).__name__}, detached)"
