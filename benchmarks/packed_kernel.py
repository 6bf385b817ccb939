"""How fast packed keys and values are attended, packed and unpacked, beside the same as they are.

    python benchmarks/packed_kernel.py --json benchmarks/results/packed-kernel.json

All rates are of the bytes that tokens have unpacked, so that a ratio of two is one of times.
Exponents are distributed as real models' (`headinfer.bench.recorded`). The CPU attends contexts
that its caches do not hold, in turn: dense ones, packed ones, and ones of 8 bits. With
`--new-tokens 1,8` it also attends several query tokens at once, as where drafts are verified. Where
there is a GPU, it packs and unpacks tiles, too. With `--mib` of dense keys and values that the
caches hold, together with their other forms, the rates are what arithmetic allows.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.partial import Accumulator
from headinfer.attend.work import Work
from headinfer.bench.document import provenance
from headinfer.bench.recorded import recorded_values
from headinfer.device.identity import cpu_name
from headinfer.eight_bits import reference as eight_bits
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV
from headinfer.packed.layout import PageLayout, num_pages
from headinfer.packed.native import pack_native, pages_library, unpack_native
from headinfer.plan.format import Format
from headinfer.probe.caches import beyond_caches

KV_HEADS, CONTEXTS, LEAST_BYTES = 8, 4, 256 * 2**20
TILE_TOKENS = 8192


def drawn(tokens: int, dim: int, layer: int, device: str = "cpu") -> KV:
    """Return keys and values of one layer."""
    generator, shape = torch.Generator(device).manual_seed(layer), (1, KV_HEADS, tokens, dim)
    draw = (
        recorded_values(shape, part, layer, torch.bfloat16, generator)
        for part in ("keys", "values")
    )
    return KV(*draw)


def pages_for(values: torch.Tensor) -> torch.Tensor:
    """Return memory for the pages of some values."""
    *heads, tokens, dim = values.shape
    shape = (*heads, num_pages(tokens), PageLayout(dim).page_bytes)
    return torch.empty(shape, dtype=torch.uint8, device=values.device)


def in_turn(ways: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Return the typical seconds of several ways, which take turns, behind a first round."""
    taken_s: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start_s = time.perf_counter()
            way(turn)
            if turn:
                taken_s[name].append(time.perf_counter() - start_s)
    return {name: statistics.median(times_s) for name, times_s in taken_s.items()}


def attention(
    dim: int, groups: list[int], new_tokens: list[int], rounds: int, num_bytes: int
) -> list[dict[str, Any]]:
    """Return the rates of the CPU's attention for each group and number of query tokens."""
    tokens = num_bytes // CONTEXTS // (2 * KV_HEADS * dim * 2) // 64 * 64
    library = pages_library(dim)
    assert library is not None, "no compiler"
    tiles: dict[Format, list[Tile]] = {form: [] for form in Format}
    for layer in range(CONTEXTS):
        kv = drawn(tokens, dim, layer)
        for form, of_form in tiles.items():
            stored = kv
            if form is Format.PACKED:
                stored = KV(*map(pages_for, kv))
                for values, page in zip(kv, stored, strict=True):
                    pack_native(library, values, page)
            elif form.code is not None:
                stored = KV(*(eight_bits.pack(form.code, values) for values in kv))
            of_form.append(Tile(0, tokens, Piece(stored.keys), stored, format=form))
    rows = []
    for group, new in itertools.product(groups, new_tokens):
        query = torch.randn(1, KV_HEADS, group, new, dim).bfloat16()

        def attend(form: Format, turn: int, query: torch.Tensor = query) -> None:
            tile = tiles[form][turn % CONTEXTS]
            NativeKernel().attend(Work(query, [tile], dim**-0.5, Accumulator()))

        ways = {form.value: functools.partial(attend, form) for form in tiles}
        taken_s = in_turn(ways, rounds)
        whole = tiles[Format.DENSE][0].whole
        rows.append(row_of("attention", "cpu", dim, sum(part.nbytes for part in whole), taken_s))
        rows[-1] |= {"group": group, "new_tokens": new}
        print_row(rows[-1])
    return rows


def row_of(
    what: str, device: str, dim: int, num_bytes: int, taken_s: dict[str, float]
) -> dict[str, Any]:
    """Return a row: rates in bytes a second, and what of the first way's time the second takes."""
    rates = {f"{name}_bytes_per_s": num_bytes / time_s for name, time_s in taken_s.items()}
    row: dict[str, Any] = {"what": what, "device": device, "dim": dim, **rates}
    if "packed" in taken_s:
        row["packed_of_dense_time"] = taken_s["packed"] / taken_s["dense"]
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print a row's rates in GB/s."""
    rates = {
        name.removesuffix("_bytes_per_s"): f"{value / 1e9:.1f} GB/s"
        for name, value in row.items()
        if name.endswith("_per_s")
    }
    rest = {name: value for name, value in row.items() if not name.endswith("_per_s")}
    print(rest | rates, flush=True)


def codec_on_cpu(dim: int, rounds: int) -> dict[str, Any]:
    """Return the rates of packing, unpacking and copying tiles in the CPU's memory."""
    library = pages_library(dim)
    assert library is not None, "no compiler"
    values, target = drawn(TILE_TOKENS, dim, 0).keys, torch.empty(0)
    target, pages = torch.empty_like(values), pages_for(values)
    ways = {
        "copy": lambda _turn: target.copy_(values),
        "pack": lambda _turn: pack_native(library, values, pages),
        "unpack": lambda _turn: unpack_native(library, pages, target),
    }
    return row_of("codec", "cpu", dim, values.nbytes, in_turn(ways, rounds))


def codec_on_cuda(dim: int, rounds: int) -> dict[str, Any]:
    """Return the rates of packing, unpacking and copying tiles in the GPU's memory."""
    from headinfer.packed.fused import TritonCodec

    codec, values = TritonCodec(), drawn(TILE_TOKENS, dim, 0, "cuda").keys
    target, pages, repeats = torch.empty_like(values), pages_for(values), 20

    def timed(call: Callable[[], object]) -> Callable[[int], None]:
        def run(_turn: int) -> None:
            for _ in range(repeats):
                call()
            torch.cuda.synchronize()

        return run

    ways = {
        "copy": timed(lambda: target.copy_(values)),
        "pack": timed(lambda: codec.pack(values, pages)),
        "unpack": timed(lambda: codec.unpack(pages, target)),
    }
    return row_of("codec", "cuda", dim, values.nbytes * repeats, in_turn(ways, rounds))


@torch.inference_mode()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--groups", default="1,4,8", help="query heads of a KV head")
    parser.add_argument("--new-tokens", default="1", help="query tokens at once")
    parser.add_argument("--rounds", type=int, default=2 * CONTEXTS)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--mib", type=int, help="MiB of dense contexts; beyond the caches")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    header = provenance() | {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        header["gpu"] = torch.cuda.get_device_name()
    num_bytes = given.mib * 2**20 if given.mib else beyond_caches(LEAST_BYTES)
    header["kv_bytes"] = num_bytes
    rows: list[dict[str, Any]] = []
    groups = [int(group) for group in given.groups.split(",")]
    new_tokens = [int(tokens) for tokens in given.new_tokens.split(",")]
    for dim in map(int, given.dims.split(",")):
        rows.append(codec_on_cpu(dim, given.rounds))
        print_row(rows[-1])
        if torch.cuda.is_available():
            rows.append(codec_on_cuda(dim, given.rounds))
            print_row(rows[-1])
        rows += attention(dim, groups, new_tokens, given.rounds, num_bytes)
        if given.json is not None:
            given.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
