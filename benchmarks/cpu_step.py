"""How long a decode step takes on the CPU, beside stock's and llama.cpp's, and what bounds it.

    python benchmarks/cpu_step.py --json benchmarks/results/cpu-step.json

SmolLM2-135M in bfloat16 behind 2K and 7K random tokens, by stock transformers, ours, and ours with
`capture=False` and with `fuse="off"`. llama.cpp takes the same steps where `llama_cpp` can be
imported and `--gguf` names files, such as one in 4 bits and one in 16. The bound is the time to
read the weights and the KV once, at the best rate of plain reads. Two times are given: on the
clock, and of all threads together. Other programs change the second less.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it

import torch
import transformers

import headinfer
from headinfer.device.identity import cpu_name
from headinfer.generation.model import ModelSource
from headinfer.integration.calls import cache_argument
from headinfer.probe.caches import beyond_caches
from headinfer.probe.operations import readers
from headinfer.probe.timing import fastest

CONTEXTS, STEPS, WARM_UP, TOKEN = (2048, 7000), 40, 5, 5
LEAST_BYTES = 512 * 2**20
OURS: dict[str, dict[str, Any]] = {
    "headinfer": {},
    "headinfer, capture=False": {"capture": False},
    "headinfer, fuse=off": {"fuse": "off"},
}

Step = Callable[[], object]


def timed(step: Step, steps: int) -> dict[str, float]:
    """Return the typical times of a step in ms, on the clock and of all threads together."""
    wall_s, threads_s = [], []
    for _ in range(WARM_UP + steps):
        start_s, start_threads_s = time.perf_counter(), time.process_time()
        step()
        wall_s.append(time.perf_counter() - start_s)
        threads_s.append(time.process_time() - start_threads_s)
    wall_s, threads_s = sorted(wall_s[WARM_UP:]), sorted(threads_s[WARM_UP:])
    return {
        "p20_ms": wall_s[len(wall_s) // 5] * 1e3,
        "median_ms": statistics.median(wall_s) * 1e3,
        "threads_p20_ms": threads_s[len(threads_s) // 5] * 1e3,
        "threads_median_ms": statistics.median(threads_s) * 1e3,
    }


def of_model(model: Any, tokens: torch.Tensor, cache: object, steps: int) -> dict[str, float]:
    """Return the times of a model's step behind some tokens."""
    given = cache_argument(model, cache)
    model(tokens, use_cache=True, logits_to_keep=1, **given)
    last = torch.tensor([[TOKEN]])
    return timed(lambda: model(last, use_cache=True, **given), steps)


def rows_of_model(model: Any, tokens: torch.Tensor, steps: int) -> Iterator[dict[str, Any]]:
    """Yield a row for stock and for ours: captured, launched, and with torch's products."""
    room = tokens.shape[1] + WARM_UP + steps
    for method, options in OURS.items():
        with headinfer.attach(model, device="cpu", **options) as offload:
            times = of_model(model, tokens, offload.new_cache(room), steps)
        yield {"method": method, **times}
    cache = transformers.DynamicCache(config=model.config)
    yield {"method": "stock", **of_model(model, tokens, cache, steps)}


def row_of_gguf(path: Path, tokens: list[int], steps: int, threads: int) -> dict[str, Any]:
    """Return the row of llama.cpp with one file."""
    import llama_cpp

    room = len(tokens) + WARM_UP + steps + 1
    llama = llama_cpp.Llama(
        str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    llama.eval(tokens)
    times = timed(lambda: llama.eval([TOKEN]), steps)
    return {"method": f"llama.cpp, {path.stem}", "file_bytes": path.stat().st_size, **times}


def step_bytes(model: Any, tokens: int) -> int:
    """Return the bytes that a step must read: weights, without rows of embeddings, and KV."""
    config = model.config
    unread = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters() if p is not unread)
    if config.tie_word_embeddings:
        weights += unread.nbytes
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_row = 2 * config.num_key_value_heads * head_dim * config.num_hidden_layers
    return weights + kv_row * tokens * model.dtype.itemsize


@torch.inference_mode()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    ways = readers(torch.device("cpu"), beyond_caches(LEAST_BYTES) // torch.float32.itemsize)
    read = fastest(ways, lambda: None, seconds=0.5)[0].best_per_s
    print(f"{cpu_name()}, {arguments.threads} threads; reads {read / 1e9:.1f} GB/s")
    folder = ModelSource(name=arguments.model).location()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    document: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
        "read_bytes_per_s": read,
        "rows": [],
    }
    files = arguments.gguf if importlib.util.find_spec("llama_cpp") else []
    for context in arguments.contexts:
        tokens = torch.randint(10, model.config.vocab_size, (1, context))
        bytes_read = step_bytes(model, context)
        print(f"behind {context} tokens; reading {bytes_read / 2**20:.0f} MiB alone takes", end=" ")
        print(f"{bytes_read / read * 1e3:.1f} ms", flush=True)
        llama = (
            row_of_gguf(f, tokens[0].tolist(), arguments.steps, arguments.threads) for f in files
        )
        for rows in (rows_of_model(model, tokens, arguments.steps), llama):
            for row in rows:
                document["rows"].append({"context_tokens": context, "bytes": bytes_read, **row})
                print(f"  {row['method']:24s} {row['median_ms']:7.1f} ms (p20", end=" ")
                print(f"{row['p20_ms']:.1f}); threads {row['threads_median_ms']:.1f}", flush=True)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
