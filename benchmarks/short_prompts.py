"""Short prompts on a GPU: headinfer and stock transformers in turns, in one process.

    python benchmarks/short_prompts.py --json benchmarks/results/gpu-short-prompts.json

Llama-3-8B's shape in bfloat16, random weights that both models share, 24 GiB of GPU memory. Each
prompt goes into a new cache. Such prompts wait for Python, whose speed changes from minute to
minute, so that only turns within one process compare. The least possible is the time of the
products at the best rate at which the GPU multiplies matrices of 8192 x 8192.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import headinfer
from headinfer.bench.document import provenance
from headinfer.bench.limits import limit_device
from headinfer.estimate.presets import PRESETS
from headinfer.integration.calls import cache_argument
from headinfer.plan.options import Options
from headinfer.probe.operations import matmuls
from headinfer.probe.timing import fastest
from headinfer.units import format_tokens, parse_tokens

PROMPTS = "128,512,1K,2K,4K,10K"
DEVICE_MEMORY = "24GiB"
WARM_UP = 4
"""Turns that are not counted: a length's first ones prepare kernels for it."""

CONFIG = AutoConfig.for_model(**PRESETS["llama-3-8b"], attn_implementation="sdpa")
Caching = Callable[[int], Any]


def timed_s(model: PreTrainedModel, new_cache: Caching, prompt: torch.Tensor) -> float:
    """Return the seconds to a prompt's likeliest next token, from a device that is idle."""
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    cache = new_cache(prompt.shape[1] + 1)
    logits = model(prompt, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
    logits.argmax().item()
    return time.perf_counter() - start_s


@torch.no_grad()
def main() -> None:
    """Measure each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", default=PROMPTS)
    parser.add_argument("--turns", type=int, default=24, help="of each length, after four more")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU is here, and these prompts are timed on one")
    torch.manual_seed(0)
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    limit_device(Options.parse(device_memory=DEVICE_MEMORY), [device])
    squares = matmuls(device, torch.bfloat16, [8192])
    rate = fastest(squares, torch.cuda.synchronize, seconds=0.2)[0].best_per_s
    del squares  # of the memory that is limited
    with device:
        stock = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    ours = copy.deepcopy(stock, {id(each): each for each in stock.parameters()})
    products = sum(each.numel() for each in stock.model.layers.parameters() if each.ndim == 2)
    with headinfer.attach(ours, device_memory=DEVICE_MEMORY) as offload:
        ways: list[tuple[PreTrainedModel, Caching]] = [
            (stock, lambda _tokens: DynamicCache(config=CONFIG)),
            (ours, offload.new_cache),
        ]
        for tokens in map(parse_tokens, arguments.prompts.split(",")):
            prompt = torch.randint(CONFIG.vocab_size, (1, tokens), device=device)
            taken_s: list[list[float]] = [[], []]
            for _ in range(WARM_UP + arguments.turns):
                for (model, new_cache), times_s in zip(ways, taken_s, strict=True):
                    times_s.append(timed_s(model, new_cache, prompt))
            stock_s, ours_s = (statistics.median(times_s[WARM_UP:]) for times_s in taken_s)
            bound_s = 2 * products * tokens / rate
            rows.append(
                {
                    "tokens": tokens,
                    "stock_s": stock_s,
                    "headinfer_s": ours_s,
                    "ratio": ours_s / stock_s,
                    "bound_s": bound_s,
                }
            )
            print(
                f"{format_tokens(tokens):>4} tokens: stock {stock_s * 1e3:.1f} ms, headinfer "
                f"{ours_s * 1e3:.1f}, {ours_s / stock_s:.2f} of it; at least {bound_s * 1e3:.1f}",
                flush=True,
            )
    if arguments.json is not None:
        document = {"gpu": torch.cuda.get_device_name(), **provenance(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
