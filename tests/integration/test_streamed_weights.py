"""Models of which accelerate keeps weights in CPU memory or on disk, against the whole ones."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import cache_argument
from headinfer.integration.stored_weights import weights_bytes
from headinfer.units import format_bytes
from parted import spread
from tiny_models import random_tokens, shared_model, tiny_model

NAMES = ["llama3", "gemma3", "qwen3-moe", "gpt-oss"]


def with_weights_on_disk(name: str, folder: Path) -> PreTrainedModel:
    """Return a model whose second layer and output lie on disk."""
    model = tiny_model(name)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    places |= {f"model.layers.{n}": "cpu" for n in range(len(model.model.layers)) if n != 1}
    del places["model.layers"]
    return accelerate.dispatch_model(model, places, offload_dir=str(folder))


def in_cpu_memory(name: str, _folder: Path) -> PreTrainedModel:
    """Return a model all of whose weights are brought for each use."""
    return accelerate.cpu_offload(tiny_model(name), execution_device=torch.device("cpu"))


def answer(model: PreTrainedModel, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
    given = {} if cache is None else cache_argument(model, cache)
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **given,
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits)


@pytest.fixture(autouse=True)
def _no_words_of_accelerate() -> Iterator[None]:
    logger = logging.getLogger("accelerate")
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu"},
        {"device": "simulated", "resident_tokens": 9, "host_attention": 0.4},
        {"device": "simulated", "simulated_device": (0, 1)},
    ],
    ids=["cpu", "simulated", "parted"],
)
@pytest.mark.parametrize("name", NAMES)
def test_generation_equals_that_of_the_whole_model(
    name: str, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = random_tokens(2, 90)
    if "simulated_device" in options:
        options = options | {"simulated_device": spread(0, 1, 1)}
    settings = {"tile_heads": 1, "tile_tokens": 20, "chunk_tokens": 13, **options}
    with headinfer.attach(shared_model(name), **settings) as offload:
        wanted = answer(shared_model(name), tokens, offload.new_cache())
    for make in (with_weights_on_disk, in_cpu_memory):
        model = make(name, tmp_path)
        assert model.model.layers[1].self_attn.q_proj.weight.is_meta
        stock = answer(model, tokens)
        caplog.clear()
        with headinfer.attach(model, **settings) as offload:
            ours = answer(model, tokens, offload.new_cache())
            assert answer(model, tokens, offload.new_cache()).isfinite().all()
        assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert torch.equal(answer(model, tokens), stock)  # it is left as it was
        said = [text for text in caplog.messages if "kernel by kernel" in text]
        assert len(said) == (options["device"] != "cpu")  # where nothing is launched by itself
        assert all("accelerate brings some of its weights" in text for text in said)


def test_only_what_is_brought_at_a_time_counts_as_weights(tmp_path: Path) -> None:
    whole = tiny_model("llama3")
    largest = max(module.weight.nbytes for module in whole.modules() if hasattr(module, "weight"))
    kept = weights_bytes(whole) - sum(
        weights_bytes(part) for part in (whole.model.layers[1], whole.lm_head)
    )
    with headinfer.attach(with_weights_on_disk("llama3", tmp_path), device="simulated") as offload:
        assert offload.plan.shape.weights_bytes == kept + largest
        brought = weights_bytes(whole) - kept
        assert offload.plan.shape.brought_bytes == brought
        assert f"{format_bytes(brought)} of weights lie elsewhere" in str(offload.plan)
    with headinfer.attach(in_cpu_memory("llama3", tmp_path), device="simulated") as offload:
        buffers = sum(buffer.nbytes for buffer in whole.buffers())
        assert offload.plan.shape.weights_bytes == largest + buffers
        assert offload.plan.shape.brought_bytes == weights_bytes(whole) - buffers
    with headinfer.attach(whole, device="simulated") as offload:
        assert offload.plan.shape.brought_bytes == 0
        assert "elsewhere" not in str(offload.plan)


def test_weights_that_nobody_brings_are_refused() -> None:
    model = tiny_model("llama3")
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="must lie on the CPU or on CUDA devices, not"):
        headinfer.attach(model)
