"""How busy the link is: decode steps of Llama-3-8B's shape behind a full cache, traced.

    python benchmarks/gpu_trace.py --context 100K --methods head-wise-1,resident,host-attention

Random weights, a cache filled at random, the device held to 24 GiB. For each method a trace of some
steps goes to FOLDER/gpu-trace-METHOD-CONTEXT.json (open it at https://ui.perfetto.dev), and what it
says to FOLDER/gpu-trace-CONTEXT.json: the share of the time in which the link brought tiles, and
the rate over whole steps beside the best rate of a single large copy.
"""

import argparse
import gc
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from headinfer.bench import machine
from headinfer.bench.build import build_model
from headinfer.bench.fill import fill_randomly
from headinfer.bench.limits import limit_device
from headinfer.bench.methods import METHODS
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.cli.bench_options import named_model
from headinfer.integration.calls import cache_argument
from headinfer.plan.options import Options
from headinfer.trace import Trace
from headinfer.units import parse_tokens

WARM_UP_STEPS, TIMED_STEPS, TRACED_STEPS = 3, 8, 3


def busy_share(document: dict[str, Any]) -> dict[str, float]:
    """Return for each line of a trace the share of its whole time in which something ran."""
    events = document["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices = [e for e in events if e["ph"] == "X"]
    device = [e for e in slices if names[e["tid"]] != "host attention"]
    start = min(e["ts"] for e in device)
    end = max(e["ts"] + e["dur"] for e in device)
    shares = {}
    for tid, name in names.items():
        done, busy = start, 0.0
        for e in sorted((e for e in slices if e["tid"] == tid), key=lambda e: e["ts"]):
            first, last = max(e["ts"], done), min(e["ts"] + e["dur"], end)
            busy += max(last - first, 0.0)
            done = max(done, last)
        shares[name] = busy / (end - start)
    return shares


@torch.no_grad()
def traced(model: Any, spec: TrialSpec, path: Path) -> dict[str, Any]:
    """Time and trace decode steps of one method."""
    with closing(METHODS[spec.method](model, spec)) as method:
        cache = method.new_cache(spec.all_tokens)
        fill_randomly(model, cache, spec.context_tokens, spec.seed)
        token = torch.zeros((1, 1), dtype=torch.long, device="cuda")

        def step() -> float:
            start_s = time.perf_counter()
            output = model(input_ids=token, use_cache=True, **cache_argument(model, cache))
            int(output.logits[0, -1].argmax())
            return time.perf_counter() - start_s

        for _ in range(WARM_UP_STEPS):
            step()
        before, _ = method.link_bytes()
        seconds = [step() for _ in range(TIMED_STEPS)]
        copied = (method.link_bytes()[0] - before) / TIMED_STEPS
        trace = Trace(path, steps=TRACED_STEPS)
        for _ in range(TRACED_STEPS + 1):
            trace.advance()
            step()
        trace.finish()
    typical_s = sorted(seconds)[TIMED_STEPS // 2]
    return {
        "method": spec.method,
        "context_tokens": spec.context_tokens,
        "decode_ms": 1e3 * typical_s,
        "copied_bytes_per_token": copied,
        "copied_bytes_per_s": copied / typical_s,
        "busy_share": busy_share(json.loads(path.read_text())),
    }


def main() -> None:
    """Trace every method asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", default="100K")
    parser.add_argument("--methods", default="head-wise-1,resident,host-attention")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    model_spec = named_model(arguments.model, "bfloat16", dummy_weights=True)
    settings = Options.parse(device="cuda", device_memory="24GiB", kv_cache="dense")
    device = torch.device("cuda")
    rates, _ = machine.measure(device, torch.bfloat16)
    limit_device(settings, device)
    model, rows = None, []
    for name in arguments.methods.split(","):
        spec = TrialSpec(
            method=name,
            context_tokens=parse_tokens(arguments.context),
            new_tokens=WARM_UP_STEPS + TIMED_STEPS + TRACED_STEPS + 1,
            dtype="bfloat16",
            seed=0,
            model=model_spec,
            settings=settings,
            fill=Fill.RANDOM,
            last_pass=False,
        )
        model = model or build_model(spec, device)
        row = traced(model, spec, arguments.folder / f"gpu-trace-{name}-{arguments.context}.json")
        row["share_of_link_rate"] = row["copied_bytes_per_s"] / (rates.link_bytes_per_s or 1.0)
        rows.append(row)
        busy = ", ".join(f"{line} {share:.0%}" for line, share in row["busy_share"].items())
        print(
            f"{name:16s} {row['decode_ms']:7.1f} ms a token, copies "
            f"{row['copied_bytes_per_s'] / 1e9:.1f} GB/s, {row['share_of_link_rate']:.0%} of the "
            f"link's; busy: {busy}",
            flush=True,
        )
        summary = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "link_bytes_per_s": rates.link_bytes_per_s,
            "model": model_spec.description,
            "rows": rows,
        }
        path = arguments.folder / f"gpu-trace-{arguments.context}.json"
        path.write_text(json.dumps(summary, indent=1) + "\n")
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
