"""How fast the CPU attends keys and values in its memory, beside how fast it reads.

    python benchmarks/host_kernel.py --json benchmarks/results/host-kernel.json

One decode step's attention of each dtype, head_dim and group (query heads of a KV head), behind
contexts of several times the processor's caches in all, none read twice in a row. The rate of
reading is the best of several plain reads, as `headinfer probe` has it, tried again after each row.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from headinfer.attend.partial import Accumulator
from headinfer.attend.select import select_kernels
from headinfer.attend.work import Work, tile_in_hand
from headinfer.device.identity import cpu_name
from headinfer.kv.pair import KV
from headinfer.probe.caches import beyond_caches
from headinfer.probe.operations import readers
from headinfer.probe.timing import fastest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = "1,2,4,5,7,8,9,12,14,16"
KV_HEADS, CONTEXTS, LEAST_BYTES = 8, 4, 512 * 2**20


def read_rate(num_bytes: int) -> float:
    """Return the best rate of plain reads, in bytes a second."""
    ways = readers(torch.device("cpu"), num_bytes // torch.float32.itemsize)
    speed, _ = fastest(ways, lambda: None, seconds=0.3)
    return speed.best_per_s


def attention_rates(
    dtype: torch.dtype, head_dim: int, groups: list[int], num_bytes: int
) -> dict[int, float]:
    """Return the typical rate of each group, in bytes of keys and values a second."""
    kernels = select_kernels(torch.device("cpu"), dtype, head_dim, head_dim)
    tokens = num_bytes // CONTEXTS // (2 * KV_HEADS * head_dim * dtype.itemsize)
    block = torch.randn(2**20).to(dtype)
    caches = torch.empty(CONTEXTS, 2, 1, KV_HEADS, tokens, head_dim, dtype=dtype)
    for part in caches.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    rates = {}
    for group in groups:
        query = torch.randn(1, KV_HEADS, group, 1, head_dim).to(dtype)
        taken_s = []
        for keys, values in [*caches[:1], *caches, *caches]:  # the first is not counted
            tile = tile_in_hand(KV(keys, values))
            start_s = time.perf_counter()
            work = Work(query, [tile], head_dim**-0.5, Accumulator())
            kernels.pick(work).attend(work)
            taken_s.append(time.perf_counter() - start_s)
        rates[group] = caches[0].nbytes / statistics.median(taken_s[1:])
    return rates


@torch.no_grad()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default=GROUPS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    groups = [int(group) for group in arguments.groups.split(",")]
    num_bytes = beyond_caches(LEAST_BYTES)
    rows: list[dict[str, Any]] = []
    read = read_rate(num_bytes)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; reads {read / 1e9:.1f} GB/s")
    print(f"{'GB/s, group':21s}", *(f"{group:5d}" for group in groups))
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS):
        rates = attention_rates(dtype, head_dim, groups, num_bytes)
        name = str(dtype).removeprefix("torch.")
        shown = (f"{rate / 1e9:5.1f}" for rate in rates.values())
        print(f"{name:9s} head_dim {head_dim:3d}", *shown, flush=True)
        rows += [
            {"dtype": name, "head_dim": head_dim, "group": group, "bytes_per_s": rate}
            for group, rate in rates.items()
        ]
        read = max(read, read_rate(num_bytes))
        if arguments.json is not None:
            document = {
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "read_bytes_per_s": read,
                "rows": rows,
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    shares = sorted(row["bytes_per_s"] / read for row in rows)
    half = sum(share >= 0.5 for share in shares)
    print(f"reading {read / 1e9:.1f} GB/s; {half} of {len(shares)} reach half of it;", end=" ")
    print(f"least {shares[0]:.0%}, median {statistics.median(shares):.0%}, most {shares[-1]:.0%}")


if __name__ == "__main__":
    main()
