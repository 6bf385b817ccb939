"""How fast a session is saved and loaded, beside a plain sequential copy of the same bytes.

    python benchmarks/session_rate.py --gib 2 --folder /data --json benchmarks/results/session.json

A cache of Llama-3-8B's shape with few layers is filled at random, saved, and loaded again. The same
bytes are then written as one file with a plain loop of `write` and read again, with as large
blocks. Files are on the disk before a write counts as done, and out of the system's memory before
they are read, where the system lets a program ask for that. A cache that is loaded takes new
memory, so the file is read into new memory, too. The best of several rounds counts.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it

import torch
import transformers

import headinfer
from headinfer.bench.fill import fill_randomly
from headinfer.device.identity import cpu_name
from headinfer.integration.saving import BLOCK_BYTES

LAYERS, KV_HEADS, HEAD_DIM = 4, 8, 128
BYTES_PER_TOKEN = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM


def tiny_weights() -> Any:
    """Return a model whose cache is Llama-3-8B's in form, and whose weights are few."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2**20,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def forget(paths: list[Path]) -> None:
    """Have the system read files from the disk again."""
    for path in paths:
        opened = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(opened)


def seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def write_plain(path: Path, block: memoryview, num_bytes: int) -> None:
    """Write as many bytes to one file, block by block, and wait for the disk."""
    with open(path, "wb", buffering=0) as file:
        left = num_bytes
        while left > 0:
            left -= file.write(block[: min(left, len(block))])
        os.fsync(file.fileno())


def read_plain(path: Path, block: memoryview) -> None:
    """Read a file block by block."""
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def read_to_new_memory(path: Path) -> None:
    """Read a file block by block into memory that was not used before."""
    memory = torch.empty(path.stat().st_size, dtype=torch.uint8).numpy().data
    with open(path, "rb", buffering=0) as file:
        done = 0
        while read := file.readinto(memory[done : done + BLOCK_BYTES]):
            done += read


def round_of(offload: Any, cache: Any, folder: Path) -> dict[str, float]:
    """Return the times of one round, and the bytes."""
    session, plain = folder / "s.hsession", folder / "plain"
    saved = cache.save(session)
    files = sorted(session.iterdir())
    forget(files)
    load_s = seconds(lambda: offload.load_cache(session).close())
    for file in files:
        file.unlink()
    block = torch.randint(256, (BLOCK_BYTES,), dtype=torch.uint8).numpy().data
    write_s = seconds(lambda: write_plain(plain, block, saved.num_bytes))
    forget([plain])
    read_s = seconds(lambda: read_plain(plain, block))
    forget([plain])
    fresh_s = seconds(lambda: read_to_new_memory(plain))
    plain.unlink()
    session.rmdir()
    return {
        "bytes": saved.num_bytes,
        "save_s": saved.seconds,
        "load_s": load_s,
        "plain_write_s": write_s,
        "plain_read_s": read_s,
        "plain_read_to_new_memory_s": fresh_s,
    }


@torch.inference_mode()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokens = int(arguments.gib * 2**30) // BYTES_PER_TOKEN
    rounds = []
    model = tiny_weights()
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        headinfer.attach(model, device="cpu") as offload,
    ):
        cache = offload.new_cache(tokens + 1)
        fill_randomly(model, cache, tokens, seed=0)
        for _ in range(arguments.rounds):
            rounds.append(round_of(offload, cache, Path(folder)))
    best = {name: min(each[name] for each in rounds) for name in rounds[0]}
    num_bytes = best["bytes"]
    pairs = ("save", "plain_write"), ("load", "plain_read"), ("load", "plain_read_to_new_memory")
    for name, other in pairs:
        own, plain = (num_bytes / best[f"{each}_s"] / 1e9 for each in (name, other))
        print(f"{name}: {own:.2f} GB/s, {own / plain:.0%} of a {other.replace('_', ' ')}", end=" ")
        print(f"({plain:.2f} GB/s), {num_bytes / 2**30:.2f} GiB")
    document = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": tokens,
        "rounds": rounds,
        "best": best,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
