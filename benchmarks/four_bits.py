"""Llama-3-70B's shape in 4 bits under a cap of GPU memory: what it takes, and a decode step's time.

    python benchmarks/four_bits.py --contexts 10K,100K,300K --device-memory 48GiB --json out.json

Random weights are made and quantised matrix by matrix where they stay, so that CPU memory never has
more than the KV cache. transformers puts bitsandbytes' matrices into the model, as `--load-in 4bit`
does. Before anything is timed, logits are compared with stock's, and torch is held to the memory.
A step's bound has each byte of weights and of KV read once, where it lies, at the rates of this
machine. `--tiny` tries all of it on the CPU.
"""

import argparse
import os
import statistics
import time
from dataclasses import asdict
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it

import bitsandbytes
import torch
import transformers
from kept_rows import add_options, kept_rows, settings_of
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

import headinfer
from headinfer.bench.bound import Rates, Work, bound
from headinfer.bench.document import provenance
from headinfer.bench.files import replace_json
from headinfer.bench.fill import fill_randomly
from headinfer.bench.gate import LOGITS_TOLERANCE_PER_LAYER
from headinfer.bench.limits import limit_device
from headinfer.bench.machine import hardware, measure
from headinfer.estimate.presets import PRESETS
from headinfer.generation.quantised import quantisation
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options
from headinfer.units import format_bytes, format_seconds, format_tokens, parse_tokens

MODEL = "llama-3-70b"
GATE_TOKENS, STEPS, WARM_STEPS = 2048, 8, 6


def shape(*, tiny: bool, positions: int) -> Any:
    """Return the config of the model."""
    values = PRESETS[MODEL] | {"max_position_embeddings": positions}
    if tiny:
        values |= {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
        values |= {"vocab_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
        values |= {"head_dim": 32}
    return transformers.AutoConfig.for_model(**values)


def in_four_bits(config: Any, device: torch.device) -> Any:
    """Return a model of random weights whose layers' matrices are in 4 bits."""
    how = quantisation("4bit", config, "bfloat16")
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = replace_with_bnb_linear(model, ["lm_head"], quantization_config=how) or model
    generator = torch.Generator(device).manual_seed(0)

    def drawn(like: torch.Tensor) -> torch.Tensor:
        if like.ndim < 2:
            return torch.ones(like.shape, dtype=torch.bfloat16, device=device)
        empty = torch.empty(like.shape, dtype=torch.bfloat16, device=device)
        # As the benchmarks have them, so that heads attend sharply.
        return empty.normal_(0.0, 1.75 / config.hidden_size**0.5, generator=generator)

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(module, bitsandbytes.nn.Linear4bit) and name == "weight":
                full = drawn(torch.empty(module.out_features, module.in_features, device="meta"))
                packed = bitsandbytes.nn.Params4bit(
                    full, requires_grad=False, quant_type="nf4", module=module
                )
                module.weight = packed.to(device)
            else:
                setattr(module, name, torch.nn.Parameter(drawn(weight), requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    model.is_quantized = model.is_loaded_in_4bit = True
    return model.eval()


def synchronise(device: torch.device) -> None:
    """Wait for all that was asked of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def logits(model: Any, tokens: int, **cache: Any) -> torch.Tensor:
    """Return those behind a random prompt, and behind each of some tokens after it."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens + STEPS), generator=drawn)
    ids = ids.to(model.device)
    cache = cache or cache_argument(model, transformers.DynamicCache(config=model.config))
    rows = [model(ids[:, :tokens], logits_to_keep=1, **cache).logits[0, -1]]
    for at in range(tokens, tokens + STEPS):
        rows.append(model(ids[:, at : at + 1], **cache).logits[0, -1])
    return torch.stack(rows).float()


def decode_row(model: Any, offload: Any, tokens: int, steps: int, rates: Rates) -> dict[str, Any]:
    """Return what a decode step takes behind so many random tokens, beside its bound."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    cache = offload.new_cache(tokens + WARM_STEPS + steps + 1)
    fill_randomly(model, cache, tokens, seed=0)
    seconds = []
    for step in range(WARM_STEPS + steps):
        ids = torch.full((1, 1), 3 + step, device=device)
        synchronise(device)
        start_s = time.perf_counter()
        model(ids, **cache.as_keyword())
        synchronise(device)
        seconds.append(time.perf_counter() - start_s)
    plan, share = cache.state.engine.plan, cache.state.engine.host_share_at(1)
    least = bound(decode_work(plan, share, tokens), rates)
    row = {
        "context_tokens": tokens,
        "decode_s": seconds[WARM_STEPS:],
        "decode_s_per_token": statistics.median(seconds[WARM_STEPS:]),
        "bound_s": least.seconds,
        "bound_by": least.limited_by,
        "captured_steps": cache.stats.captured_steps,
        "resident_tokens": plan.resident_tokens,
        "host_share": share,
        "planned_device_bytes": plan.total_device_bytes,
        "kv_host_bytes": cache.stats.host_kv_bytes,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device)
        if device.type == "cuda"
        else None,
    }
    cache.close()
    return row


def decode_work(plan: Any, host_share: float, tokens: int) -> Work:
    """Return the bytes of a step: weights and resident KV on the GPU, the rest by link and CPU."""
    streamed = plan.streamed_bytes(tokens)
    by_host = int(streamed * host_share)
    return Work(
        host_bytes=by_host,
        link_bytes=streamed - by_host,
        device_bytes=plan.shape.weights_bytes + plan.shape.kv_bytes(tokens) - by_host,
    )


@torch.inference_mode()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="10K,100K")
    parser.add_argument("--device-memory", default="48GiB")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tiny", action="store_true")
    add_options(parser, "context")
    given = parser.parse_args()
    contexts = [parse_tokens(each, "--contexts") for each in given.contexts.split(",")]
    device = torch.device("cpu") if given.tiny else torch.device("cuda", 0)
    rates, _ = measure(device, torch.bfloat16)
    header = provenance() | {
        "hardware": hardware(device),
        "rates": asdict(rates),
        "bitsandbytes": bitsandbytes.__version__,
        "settings": settings_of(given),
    }
    rows = kept_rows(given, header, but={"contexts"})
    start_s = time.perf_counter()
    config = shape(tiny=given.tiny, positions=max(contexts) + 2**16)
    model = in_four_bits(config, device)
    weights = model_shape(model).weights_bytes
    print(f"{MODEL}: {format_bytes(weights)} in 4 bits, {time.perf_counter() - start_s:.1f} s")
    gate_tokens = 64 if given.tiny else GATE_TOKENS
    stock = logits(model, gate_tokens)
    allowed = LOGITS_TOLERANCE_PER_LAYER["bfloat16"] * config.num_hidden_layers
    limit = None if given.tiny else given.device_memory
    limit_device(Options.parse(device_memory=limit or "auto"), [device])
    with headinfer.attach(model, device_memory=limit) as offload:
        ours = logits(model, gate_tokens, **offload.new_cache().as_keyword())
        error = ((ours - stock).norm(dim=-1) / stock.norm(dim=-1)).max().item()
        same = error <= allowed
        print(
            f"logits are off from stock's by {error:.2g} of their length; {allowed:.2g} is allowed"
        )
        found = {"header": header, "model": MODEL, "weights_bytes": weights, "logits_error": error}
        for tokens in contexts:
            if not same or any(row["context_tokens"] == tokens for row in rows):
                continue
            row = decode_row(model, offload, tokens, given.steps, rates)
            rows.append(row)
            print(
                f"{format_tokens(tokens)}: {format_seconds(row['decode_s_per_token'])} a token, "
                f"{row['bound_s'] / row['decode_s_per_token']:.0%} of the bound by "
                f"{row['bound_by']}, {row['resident_tokens']} tokens resident, "
                f"{format_bytes(row['planned_device_bytes'])} planned"
            )
            remedy = "make room, then give the command again"
            replace_json(given.json, found | {"rows": rows}, remedy=remedy)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
