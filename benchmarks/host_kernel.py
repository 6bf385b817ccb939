"""How fast the CPU attends keys and values in its memory, beside how fast it reads.

    python benchmarks/host_kernel.py --json benchmarks/results/host-kernel.json

One decode step's attention of each dtype, head_dim and group (query heads of a KV head), behind
contexts of several times the processor's caches in all, none read twice in a row. The rate of
reading is the best of several plain reads, as `headinfer probe` has it, tried again after each row.
A second table is of several new tokens at once, as where drafted ones are verified: numbers of them
take turns, and each rate stands beside one token's.

With `--mib` of keys and values that the caches hold, the rates are what arithmetic allows, and the
rate of reading is the caches'.
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
NEW_TOKENS = "1,2,4,8,16"
VERIFY_GROUP, VERIFY_HEAD_DIM = 4, 128
KV_HEADS, CONTEXTS, LEAST_BYTES = 8, 4, 512 * 2**20


def read_rate(num_bytes: int) -> float:
    """Return the best rate of plain reads, in bytes a second."""
    ways = readers(torch.device("cpu"), num_bytes // torch.float32.itemsize)
    speed, _ = fastest(ways, lambda: None, seconds=0.3)
    return speed.best_per_s


def attention_rates(
    dtype: torch.dtype, head_dim: int, shapes: list[tuple[int, int]], num_bytes: int
) -> list[float]:
    """Return the typical rate of each group and number of new tokens, in bytes of KV a second."""
    kernels = select_kernels(torch.device("cpu"), dtype, head_dim, head_dim)
    tokens = num_bytes // CONTEXTS // (2 * KV_HEADS * head_dim * dtype.itemsize)
    block = torch.randn(2**20).to(dtype)
    caches = torch.empty(CONTEXTS, 2, 1, KV_HEADS, tokens, head_dim, dtype=dtype)
    for part in caches.view(-1).split(block.numel()):
        part.copy_(block[: part.numel()])
    queries = [torch.randn(1, KV_HEADS, *shape, head_dim).to(dtype) for shape in shapes]
    taken_s: list[list[float]] = [[] for _ in shapes]
    contexts = itertools.cycle(caches)
    for _ in range(1 + 2 * CONTEXTS):  # the first is not counted
        for query, times_s in zip(queries, taken_s, strict=True):
            tile = tile_in_hand(KV(*next(contexts)))
            start_s = time.perf_counter()
            work = Work(query, [tile], head_dim**-0.5, Accumulator())
            kernels.pick(work).attend(work)
            times_s.append(time.perf_counter() - start_s)
    return [caches[0].nbytes / statistics.median(times_s[1:]) for times_s in taken_s]


@torch.no_grad()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default=GROUPS, help="query heads of a KV head")
    parser.add_argument("--new-tokens", default=NEW_TOKENS, help="query tokens, one first")
    parser.add_argument("--mib", type=int, help="MiB of keys and values; beyond the caches")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    groups = [int(group) for group in arguments.groups.split(",") if group]
    new_tokens = [int(tokens) for tokens in arguments.new_tokens.split(",") if tokens]
    num_bytes = arguments.mib * 2**20 if arguments.mib else beyond_caches(LEAST_BYTES)
    rows: list[dict[str, Any]] = []
    read = read_rate(num_bytes)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads; reads {read / 1e9:.1f} GB/s")

    def save() -> None:
        if arguments.json is not None:
            document = {
                "cpu": cpu_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "kv_bytes": num_bytes,
                "read_bytes_per_s": read,
                "rows": rows,
            }
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")

    if groups:
        print(f"{'GB/s, group':21s}", *(f"{group:5d}" for group in groups))
    for dtype, head_dim in itertools.product(DTYPES, HEAD_DIMS if groups else ()):
        rates = attention_rates(dtype, head_dim, [(group, 1) for group in groups], num_bytes)
        name = str(dtype).removeprefix("torch.")
        shown = (f"{rate / 1e9:5.1f}" for rate in rates)
        print(f"{name:9s} head_dim {head_dim:3d}", *shown, flush=True)
        rows += [
            {"dtype": name, "head_dim": head_dim, "group": group, "bytes_per_s": rate}
            for group, rate in zip(groups, rates, strict=True)
        ]
        read = max(read, read_rate(num_bytes))
        save()
    if rows:
        shares = sorted(row["bytes_per_s"] / read for row in rows)
        half = sum(share >= 0.5 for share in shares)
        print(f"reading {read / 1e9:.1f} GB/s; {half} of {len(shares)} reach half of it;", end=" ")
        print(
            f"least {shares[0]:.0%}, median {statistics.median(shares):.0%}, most {shares[-1]:.0%}"
        )
    if new_tokens:
        print(f"{'GB/s, new tokens':21s}", *(f"{tokens:11d}" for tokens in new_tokens))
    for dtype in DTYPES if new_tokens else ():
        shapes = [(VERIFY_GROUP, tokens) for tokens in new_tokens]
        rates = attention_rates(dtype, VERIFY_HEAD_DIM, shapes, num_bytes)
        name = str(dtype).removeprefix("torch.")
        shown = (f"{rate / 1e9:5.1f} {rate / rates[0]:5.0%}" for rate in rates)
        print(f"{name:9s} group {VERIFY_GROUP:6d}", *shown, flush=True)
        rows += [
            {"dtype": name, "head_dim": VERIFY_HEAD_DIM, "group": VERIFY_GROUP}
            | {"new_tokens": tokens, "bytes_per_s": rate, "of_the_first": rate / rates[0]}
            for tokens, rate in zip(new_tokens, rates, strict=True)
        ]
        save()


if __name__ == "__main__":
    main()
