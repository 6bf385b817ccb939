"""The models that tests split over ranks, and what is asked of them, split or whole."""

from pathlib import Path

import torch

from headinfer.heads.formats import write_pattern
from headinfer.heads.pattern import HeadPattern
from headinfer.schedule import route
from tiny_models import random_tokens

VOCABULARY = 98
"""Transformers 5.17 splits no vocabulary that the ranks cannot share evenly."""

MODELS = {
    "llama3": {},  # 4 KV heads, for 8 query heads
    "qwen2": {},  # with biases
    "mistral-sliding": {},
    "phi3": {},  # each rank has all heads
}

DEVICES = {
    "cpu": {"chunk_tokens": 16},
    "simulated": {
        "chunk_tokens": 13,
        "tile_tokens": 7,
        "tile_heads": 1,
        "resident_tokens": 5,
        "host_attention": 0.4,
    },
}

ON = [
    *(("llama3", device) for device in DEVICES),
    *(("phi3", device) for device in DEVICES),
    ("qwen2", "cpu"),
    ("mistral-sliding", "simulated"),
]
"""On which of the CPU's devices each of the models is: how it is split has no part in that."""

STREAMED = {
    "streamed": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 48, "chunk_tokens": 16},
    "host": {"resident_tokens": 0, "host_attention": 0.99, "chunk_tokens": 16},
    "both": {
        "resident_tokens": 9,
        "host_attention": 0.5,
        "tile_heads": 2,
        "tile_tokens": 16,
        "chunk_tokens": 16,
    },
}
"""Steps that come in one launch, once few tokens are enough for that (`few_are_steady`)."""

LATE_RUN = ("both", True)
STREAMED_RUNS = [(name, False) for name in STREAMED] + [LATE_RUN]
"""Of which of these, and whether one rank is ready for it later than the other."""

STREAMED_TOKENS = 100
"""New tokens, in which pages fill, and what is streamed changes."""

GPU_DEVICES = {
    "cuda": {"chunk_tokens": 13},  # all resident: a step is one launch, with NCCL's kernels in it
    "cuda streamed": {
        "chunk_tokens": 13,
        "tile_tokens": 16,
        "tile_heads": 1,
        "resident_tokens": 5,
        "host_attention": 0.4,
    },
}

ON_GPUS = [
    *(("llama3", device) for device in GPU_DEVICES),
    ("phi3", "cuda"),
    ("qwen2", "cuda"),
    ("mistral-sliding", "cuda streamed"),
]
"""On which of them each model is: both compile kernels for each, which takes long."""

PATTERN = {
    "sparsity": 0.4,
    "head_pattern": "random:3",
    "sink_tokens": 2,
    "recent_tokens": 8,
}


UNEVEN = {"sparsity": 0.5, "sink_tokens": 2, "recent_tokens": 8}
"""Of a pattern in which all heads of the second rank stream, and none of the first."""

ABOVE_DISK = {
    "device": "simulated",
    "tile_heads": 1,
    "tile_tokens": 64,
    "chunk_tokens": 90,
    "resident_tokens": 0,
    "host_attention": "off",
}

LONG = 700
"""Tokens of which a disk has some."""

GROWING = (random_tokens(1, 45), random_tokens(1, 600), random_tokens(1, 1))
"""Calls of which the second takes more CPU memory than the first left room for."""


def few_are_steady() -> None:
    """Have what is streamed stay for a while though there are few tokens in a test."""
    route.STEADY_TOKENS = 48
    route._STEADY_FROM = 0


def save_uneven_pattern(path: Path, layers: int) -> None:
    scores = ((1.0, 1.0, 0.0, 0.0),) * layers
    write_pattern(path, HeadPattern(model="", scores=scores, sink_tokens=2, recent_tokens=8))


def last_logits(model, cache: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(ids, **cache).logits[:, -1] for ids in GROWING]


def two_caches(model, offload) -> list[torch.Tensor]:
    """Return logits of two caches, which have all tokens or outgrow what the other leaves."""
    ids, found = random_tokens(1, LONG).to(model.device), []
    first, second = (offload.new_cache(LONG + 50) for _ in range(2))
    with torch.no_grad():
        for cache, start, end in (
            *((first, 0, 99), (second, 0, LONG), (first, 99, LONG)),
            *((first, at, at + 1) for at in range(3)),
            *((second, 9 * at, 9 * at + 9) for at in range(4)),
        ):
            call = cache.as_keyword()
            found.append(model(ids[:, start:end], **call, logits_to_keep=2).logits.cpu())
    return found


def prompt(rows: int) -> torch.Tensor:
    return random_tokens(rows, 45)


def logits(model, cache: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(prompt(2).to(model.device), **cache).logits.cpu()


def answers(model, cache) -> dict[str, torch.Tensor]:
    """Return token ids by how they were generated; `cache` makes keywords for each call."""

    def generate(rows: int, **settings) -> torch.Tensor:
        mask = torch.ones_like(prompt(rows))
        mask[1:, :3] = 0  # the second row is padded
        return model.generate(
            prompt(rows).to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=9,
            pad_token_id=0,
            **cache(),
            **settings,
        ).cpu()

    def sampled() -> torch.Tensor:
        torch.manual_seed(5)
        return generate(1, do_sample=True, top_k=0)

    return {
        "one row": generate(1, do_sample=False),
        "two rows": generate(2, do_sample=False),
        "beams": generate(1, do_sample=False, num_beams=3),
        "sampled": sampled(),
    }
