"""A chunk that attends on the device to itself alone has the host's part of its past, too."""

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, tiny_model


@pytest.mark.parametrize("new_tokens", [2, 5, 16])
def test_the_hosts_part_is_merged_into_what_few_new_tokens_see_of_themselves(
    new_tokens: int,
) -> None:
    model, ids = tiny_model("llama3"), random_tokens(1, 90 + new_tokens)
    with torch.no_grad():
        stock = DynamicCache(config=model.config)
        model(ids[:, :90], **cache_argument(model, stock))
        wanted = model(ids[:, 90:], **cache_argument(model, stock)).logits
        with headinfer.attach(
            model, device="simulated", resident_tokens=0, host_attention=1.0, chunk_tokens=90
        ) as offload:
            cache = offload.new_cache()
            model(ids[:, :90], **cache.as_keyword())
            found = model(ids[:, 90:], **cache.as_keyword()).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
