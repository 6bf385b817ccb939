"""What streaming costs the attention of a prefill chunk, beside the same with all KV on the device.

    python benchmarks/gpu_prefill_attention.py --json benchmarks/results/gpu-prefill-attention.json

The layers of Llama-3-8B, no weights: each attends a chunk to the tokens before it and to itself.
By the engine, with every token before it in host memory in each form, and tiles as the plan chooses
them; and by the same kernel in two calls, with one layer's keys and values whole on the device.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from headinfer.attend.partial import Accumulator
from headinfer.attend.select import select_kernels
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work, by_kv_head, tile_in_hand
from headinfer.device.cuda import CudaDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.estimate.presets import preset_shape
from headinfer.kv.pair import KV
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape
from headinfer.units import parse_tokens

KV_HEADS, GROUP, DIM = 8, 4, 128
FILL_TOKENS, PASSES = 8192, 3


def drawn(*shape: int) -> torch.Tensor:
    """Return random numbers on the device."""
    return torch.randn(shape, device="cuda").to(torch.bfloat16)


def typical_s(run: Callable[[], object], undo: Callable[[], object] = lambda: None) -> float:
    """Return the median seconds the device takes, after two runs that are not counted."""
    times = []
    for _ in range(2 + PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
        undo()
    return statistics.median(times[2:])


def streamed_s(
    shape: ModelShape, plan: Plan, kernels: Kernels, queries: torch.Tensor, new: KV, past: int
) -> float:
    """Return the seconds of a layer whose chunk attends tokens in host memory."""
    layers = len(shape.full_layers)
    engine = Engine(CudaDevice(torch.device("cuda")), plan, torch.bfloat16, Stats())
    engine.expect(past + new.keys.shape[2])
    for layer in range(layers):
        for first in range(0, past, FILL_TOKENS):
            tokens = min(FILL_TOKENS, past - first)
            engine.append(layer, *(part[:, :, :tokens] for part in new))

    def attend() -> None:
        for layer in range(layers):
            engine.attend(layer, queries, *new, kernels=kernels, scale=DIM**-0.5)

    def undo() -> None:
        for layer in range(layers):
            engine.crop(layer, new.keys.shape[2])

    seconds = typical_s(attend, undo) / layers
    engine.close()
    return seconds


@torch.no_grad()
def main() -> None:
    """Measure each context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="40K,100K")
    parser.add_argument("--chunk-tokens", default="8K")
    parser.add_argument("--kv-cache", default="dense,packed", help="forms in host memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape, rows = preset_shape("llama-3-8b"), []
    chunk = parse_tokens(arguments.chunk_tokens)
    kernels = select_kernels(torch.device("cuda"), torch.bfloat16, DIM, DIM)
    queries = drawn(1, KV_HEADS * GROUP, chunk, DIM)
    new = KV(drawn(1, KV_HEADS, chunk, DIM), drawn(1, KV_HEADS, chunk, DIM))
    query = by_kv_head(queries, new)
    for context in map(parse_tokens, arguments.contexts.split(",")):
        past = context - chunk
        keys, values = drawn(1, KV_HEADS, past, DIM), drawn(1, KV_HEADS, past, DIM)

        def whole(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
            for past, causal in ((KV(keys, values), False), (new, True)):
                work = Work(query, [tile_in_hand(past)], DIM**-0.5, Accumulator(), causal=causal)
                kernels.pick(work).attend(work)

        whole_s = typical_s(whole)
        del keys, values
        flops = 4.0 * KV_HEADS * GROUP * DIM * chunk * (past + chunk / 2)
        for form in arguments.kv_cache.split(","):
            options = Options.parse(
                device_memory="24GiB",
                chunk_tokens=chunk,
                resident_tokens=0,
                host_attention="off",
                kv_cache=form,
            )
            plan = resolve(shape, options, device="cuda", context_tokens=context)
            seconds = streamed_s(shape, plan, kernels, queries, new, past)
            row = {
                "context_tokens": context,
                "chunk_tokens": chunk,
                "format": form,
                "tile_heads": plan.tile_heads,
                "tile_tokens": plan.tile_tokens,
                "streamed_flops_per_s": flops / seconds,
                "whole_flops_per_s": flops / whole_s,
            }
            rows.append(row)
            print(
                f"chunk of {chunk} at {context}: {seconds * 1e3:.2f} ms a layer streamed {form} in "
                f"tiles of {plan.tile_heads} x {plan.tile_tokens}, {whole_s * 1e3:.2f} on the "
                f"device; {flops / seconds / 1e12:.0f} of {flops / whole_s / 1e12:.0f} TFLOP/s, "
                f"{whole_s / seconds:.0%}",
                flush=True,
            )
        if arguments.json is not None:
            document = {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "kernel": kernels.name,
                "rows": rows,
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
