"""On a GPU tokens on a disk give the bits that they give in host memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options",
    [{}, {"overlap": False}, {"resident_tokens": 256}, {"tile_heads": "all"}],
    ids=["overlapping", "in-turn", "residents", "all-heads"],
)
def test_the_bits_of_host_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_model("llama3", head_dim=64).to("cuda", torch.bfloat16)
    prompt, outcomes = random_tokens(1, 3000).to("cuda"), []
    for folder in (None, tmp_path):
        settings = {"resident_tokens": 0, "tile_heads": 1, **options}
        with headinfer.attach(
            model,
            tile_tokens=256,
            host_attention="off",
            capture=False,  # as above a disk: a captured step merges in another order
            disk_cache=folder,
            host_memory=None if folder is None else "5MiB",
            **settings,
        ) as offload:
            cache = offload.new_cache(3100)
            logits = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
            for at in range(20):
                logits.append(model(prompt[:, at : at + 1], past_key_values=cache).logits)
            assert (offload.stats.bytes_from_disk > 0) is (folder is not None)
            outcomes.append(torch.cat(logits, dim=1))
    assert torch.equal(*outcomes)
