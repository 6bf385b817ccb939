"""Prefill and decode times of two source trees, measured in turns on one machine.

Every round starts a process for each tree, with the same random model and tokens. What is printed
is the median over rounds of each process's median step, and the ratio of the two trees.

    git worktree add ../before COMMIT
    python benchmarks/compare_trees.py ../before . --names COMMIT here --json compared.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_STEPS, _WARM_UP_STEPS = 24, 4

# name: model size, context, options of attach
Settings = dict[str, tuple[str, int, dict[str, Any]]]

GPU: Settings = {
    "resident 1K": ("8B", 1024, {"resident_tokens": "all"}),
    "resident 10K": ("8B", 10240, {"resident_tokens": "all"}),
    "resident 40K": ("8B", 40960, {"resident_tokens": "all"}),
    "1 head x all, 10K": ("8B", 10240, {"tile_heads": 1, "tile_tokens": "all"}),
    "1 head x 2K, 10K": ("8B", 10240, {"tile_heads": 1, "tile_tokens": 2048}),
    "all heads x 16K, 100K": ("8B", 102400, {"tile_heads": "all", "tile_tokens": 16384}),
    "host attends 0.7, 100K": (
        "8B",
        102400,
        {"tile_heads": "all", "tile_tokens": 16384, "host_attention": 0.7},
    ),
}
CPU: Settings = {
    "cpu 1K": ("tiny", 1024, {"device": "cpu"}),
    "cpu 16K": ("tiny", 16384, {"device": "cpu"}),
    "simulated, resident 1K": ("tiny", 1024, {"device": "simulated", "resident_tokens": "all"}),
    "simulated, 1 head x 256, 1K": (
        "tiny",
        1024,
        {"device": "simulated", "tile_heads": 1, "tile_tokens": 256, "resident_tokens": 0},
    ),
}
_SIZES = {"8B": (4096, 14336, 32, 32, 8, 128256), "tiny": (256, 512, 4, 8, 4, 512)}


def as_keyword(cache: Any) -> dict[str, Any]:
    """Return a cache as a call takes it; trees before transformers 5.24 had one name for that."""
    return cache.as_keyword() if hasattr(cache, "as_keyword") else {"past_key_values": cache}


def measure(settings: Settings) -> dict[str, dict[str, float]]:
    """Return seconds of a prefill and of a decode step under each of some settings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import headinfer

    device = "cuda" if settings is GPU else "cpu"
    models, results = {}, {}
    for name, (size, context, given) in settings.items():
        if size not in models:
            hidden, mlp, layers, heads, kv_heads, vocabulary = _SIZES[size]
            config = LlamaConfig(
                hidden_size=hidden,
                intermediate_size=mlp,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                vocab_size=vocabulary,
                max_position_embeddings=2**20,
            )
            torch.manual_seed(0)
            torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
            with torch.device(device):
                models[size] = LlamaForCausalLM(config).eval()
            torch.set_default_dtype(torch.float32)
        model = models[size]
        options = {"resident_tokens": 0, "host_attention": "off", **given}
        tokens = torch.randint(0, model.config.vocab_size, (1, context + 64), device=device)

        def now() -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        with headinfer.attach(model, **options) as offload, torch.no_grad():
            prefills = []
            for _ in range(2):  # the first compiles
                cache = offload.new_cache(context + 64)
                start_s = now()
                model(tokens[:, :context], **as_keyword(cache), logits_to_keep=1)
                prefills.append(now() - start_s)
                if len(prefills) < 2:
                    cache.close()
            steps = []
            for step in range(_WARM_UP_STEPS + _STEPS):
                token = tokens[:, context + step, None]
                start_s = now()
                model(token, **as_keyword(cache))
                steps.append(now() - start_s)
            cache.close()
        results[name] = {
            "prefill_s": prefills[-1],
            "decode_s": statistics.median(steps[_WARM_UP_STEPS:]),
        }
    return results


def main() -> None:
    """Measure two trees in turns, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="a source tree")
    parser.add_argument("after", type=Path, nargs="?", help="another one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="a small model without a GPU")
    parser.add_argument("--names", nargs=2, default=["before", "after"], help="of the two trees")
    parser.add_argument("--only", help="settings whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = CPU if arguments.cpu else GPU
    if arguments.only:
        for name in [name for name in settings if arguments.only not in name]:
            del settings[name]
    if arguments.child:
        print(json.dumps(measure(settings)))
        return
    trees = dict(zip(arguments.names, (arguments.before, arguments.after), strict=True))
    rows: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in trees}
    flags = [flag for flag in sys.argv[1:] if flag == "--cpu"]
    if arguments.only:
        flags += ["--only", arguments.only]
    for _ in range(arguments.rounds):
        for name, tree in trees.items():
            child = subprocess.run(
                [sys.executable, __file__, "--child", *flags],
                env={**os.environ, "PYTHONPATH": str(tree.resolve() / "src")},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            rows[name].append(json.loads(child.stdout.splitlines()[-1]))
            if arguments.json:  # after each process: a run that is cut off keeps what it has
                report = {"machine": machine(), "trees": arguments.names, "rounds": rows}
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        print_medians(settings, rows)


def print_medians(settings: Settings, rows: dict[str, list[dict[str, dict[str, float]]]]) -> None:
    """Print the medians over the rounds so far, and their ratios."""
    print(f"{'median ms':28}{'prefill':>10}{'after':>10}{'ratio':>7}", end="")
    print(f"{'decode':>10}{'after':>9}{'ratio':>7}")
    for setting in settings:
        print(f"{setting:28}", end="")
        for kind, width in (("prefill_s", 10), ("decode_s", 9)):
            before, after = (
                1e3 * statistics.median([each[setting][kind] for each in rows[tree]])
                for tree in rows
            )
            print(f"{before:10.2f}{after:{width}.2f}{after / before:7.2f}", end="")
        print()


def machine() -> dict[str, str]:
    """Return what it was measured on."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
