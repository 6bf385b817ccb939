"""What streaming costs the attention of a prefill chunk, beside the same with all KV on the device.

    python benchmarks/gpu_prefill_attention.py --json benchmarks/results/gpu-prefill-attention.json

The layers of Llama-3-8B, no weights: each attends a chunk to the tokens before it and to itself.
Once by the engine, with every token before it in host memory and tiles as the plan chooses them;
and once by the same kernel in two calls, with one layer's keys and values whole on the device.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from headinfer.attend.partial import Accumulator
from headinfer.attend.select import select_kernels
from headinfer.attend.work import Work, tile_in_hand
from headinfer.device.cuda import CudaDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.estimate.presets import preset_shape
from headinfer.kv.pair import KV
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
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


@torch.no_grad()
def main() -> None:
    """Measure each context."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="40K,100K")
    parser.add_argument("--chunk-tokens", default="8K")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    shape, scale, rows = preset_shape("llama-3-8b"), DIM**-0.5, []
    chunk = parse_tokens(arguments.chunk_tokens)
    kernels = select_kernels(torch.device("cuda"), torch.bfloat16, DIM, DIM)
    query = drawn(1, KV_HEADS, GROUP, chunk, DIM)
    new_keys, new_values = drawn(1, KV_HEADS, chunk, DIM), drawn(1, KV_HEADS, chunk, DIM)
    for context in map(parse_tokens, arguments.contexts.split(",")):
        past, layers = context - chunk, len(shape.full_layers)
        options = Options.parse(
            device_memory="24GiB", chunk_tokens=chunk, resident_tokens=0, host_attention="off"
        )
        plan = resolve(shape, options, device="cuda", context_tokens=context)
        engine = Engine(CudaDevice(torch.device("cuda")), plan, torch.bfloat16, Stats())
        engine.expect(context)
        for layer in range(layers):
            for first in range(0, past, FILL_TOKENS):
                tokens = min(FILL_TOKENS, past - first)
                engine.append(layer, new_keys[:, :, :tokens], new_values[:, :, :tokens])

        def streamed(engine: Engine = engine, layers: int = layers) -> None:
            for layer in range(layers):
                engine.attend(layer, query, new_keys, new_values, kernels=kernels, scale=scale)

        def undo(engine: Engine = engine, layers: int = layers) -> None:
            for layer in range(layers):
                engine.crop(layer, chunk)

        streamed_s = typical_s(streamed, undo) / layers
        engine.close()
        keys, values = drawn(1, KV_HEADS, past, DIM), drawn(1, KV_HEADS, past, DIM)

        def whole(keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
            for past, causal in ((KV(keys, values), False), (KV(new_keys, new_values), True)):
                work = Work(query, [tile_in_hand(past)], scale, Accumulator(), causal=causal)
                kernels.pick(work).attend(work)

        whole_s = typical_s(whole)
        flops = 4.0 * KV_HEADS * GROUP * DIM * chunk * (past + chunk / 2)
        row = {
            "context_tokens": context,
            "chunk_tokens": chunk,
            "tile_heads": plan.tile_heads,
            "tile_tokens": plan.tile_tokens,
            "streamed_flops_per_s": flops / streamed_s,
            "whole_flops_per_s": flops / whole_s,
        }
        rows.append(row)
        print(
            f"chunk of {chunk} at {context}: {streamed_s * 1e3:.2f} ms a layer streamed in tiles "
            f"of {plan.tile_heads} x {plan.tile_tokens}, {whole_s * 1e3:.2f} on the device; "
            f"{flops / streamed_s / 1e12:.0f} of {flops / whole_s / 1e12:.0f} TFLOP/s, "
            f"{whole_s / streamed_s:.0%}",
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
