"""How long a decode step takes on the CPU, beside stock's and llama.cpp's, and what bounds it.

    pip install llama-cpp-python  # which compiles for ten minutes; its rows are left out without it
    python benchmarks/cpu_step.py --json benchmarks/results/cpu-step.json

SmolLM2-135M in bfloat16 behind 2K and 7K random tokens, by stock transformers, ours, and ours with
`capture=False` and with `fuse="off"`. llama.cpp takes the same steps with the 4-bit file that the
model was unpacked from, and with one in bfloat16 that it makes of that. `--gguf` names others.

All methods are timed in turns, some steps at a time. A row has the turn with the least median, and
the medians of all. The bound is the time to read the weights and the KV once, at the best rate of
plain reads. Two times are given: on the clock, and of all threads together. Other programs change
the second less.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # not in llama.cpp's processes
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it

import torch
import transformers

import headinfer
from headinfer.bench.document import provenance
from headinfer.bench.machine import hardware
from headinfer.bench.neighbours import Neighbours
from headinfer.device.identity import cpu_name
from headinfer.generation.model import ModelSource
from headinfer.gguf_models.packaged import PACKAGED
from headinfer.integration.calls import cache_argument
from headinfer.probe.caches import beyond_caches
from headinfer.probe.operations import readers
from headinfer.probe.timing import fastest

CONTEXTS, TURNS, STEPS, WARM_UP, TOKEN = (2048, 7000), 5, 20, 4, 5
LEAST_BYTES = 512 * 2**20
OURS: dict[str, dict[str, Any]] = {
    "headinfer": {},
    "headinfer, capture=False": {"capture": False},
    "headinfer, fuse=off": {"fuse": "off"},
}

Step = Callable[[], object]
Turn = Callable[[int], dict[str, float]]
"""Times so many steps."""


def timed(step: Step, steps: int) -> dict[str, float]:
    """Return the typical times of a step in ms, on the clock and of all threads together."""
    wall_s, threads_s = [], []
    neighbours = Neighbours()
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
        "others_cpu_share": neighbours.cpu_share(),
    }


def quietest(turns: list[dict[str, float]]) -> dict[str, Any]:
    """Return the turn with the least median, and the medians of all."""
    medians = [turn["median_ms"] for turn in turns]
    return {**min(turns, key=lambda turn: turn["median_ms"]), "medians_ms": medians}


def twin(model: Any) -> Any:
    """Return a model of its own with the same weights."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def step_of_model(model: Any, tokens: torch.Tensor, cache: object) -> Step:
    """Return a model's step, behind some tokens that it reads now."""
    given = cache_argument(model, cache)
    model(tokens, use_cache=True, logits_to_keep=1, **given)
    last = torch.tensor([[TOKEN]])
    return lambda: model(last, use_cache=True, **given)


def steps_of_models(
    model: Any, tokens: torch.Tensor, room: int, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Step]]:
    """Yield the steps of ours, captured, launched and with torch's products, and of stock."""
    for method, options in OURS.items():
        own = twin(model)
        offload = stack.enter_context(headinfer.attach(own, device="cpu", **options))
        yield method, step_of_model(own, tokens, offload.new_cache(room))
    cache = transformers.DynamicCache(config=model.config)
    yield "stock", step_of_model(model, tokens, cache)


def silent_llama_cpp() -> Any:
    """Return llama.cpp's library, which says nothing on the terminal."""
    import llama_cpp

    llama_cpp.silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept as long as it is called
    llama_cpp.llama_log_set(llama_cpp.silent, ctypes.c_void_p(0))
    return llama_cpp


def serve_gguf(turns: Connection, path: Path, tokens: list[int], room: int, threads: int) -> None:
    """Read some tokens with llama.cpp and one file, and then time steps when it is asked to."""
    llama = silent_llama_cpp().Llama(
        str(path), n_ctx=room, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    llama.eval(tokens)
    turns.send(None)
    while steps := turns.recv():
        turns.send(timed(lambda: llama.eval([TOKEN]), steps))


@contextlib.contextmanager
def turns_of_gguf(*given: Any) -> Iterator[Turn]:
    """Give what times llama.cpp's steps, in a process of its own; see `serve_gguf`.

    Its threads wait as is their default: OpenMP is told how before it is loaded.
    """
    context = multiprocessing.get_context("spawn")
    turns, others = context.Pipe()
    process = context.Process(target=serve_gguf, args=(others, *given))
    policy = os.environ.pop("OMP_WAIT_POLICY")
    process.start()
    os.environ["OMP_WAIT_POLICY"] = policy
    others.close()
    turns.recv()

    def turn(steps: int) -> dict[str, float]:
        turns.send(steps)
        return turns.recv()

    yield turn
    turns.send(0)
    process.join()


def packaged_files(name: str, folder: Path) -> list[Path]:
    """Return the file that a model's package carries, and the same in bfloat16, by llama.cpp."""
    library, packaged = silent_llama_cpp(), PACKAGED[name]
    packed = packaged.join(packaged.files(), folder / f"{packaged.title}.gguf")
    unpacked = folder / f"{packaged.title}.BF16.gguf"
    how = library.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = library.LLAMA_FTYPE_MOSTLY_BF16, True
    if library.llama_model_quantize(bytes(packed), bytes(unpacked), how):
        raise SystemExit(f"llama.cpp cannot unpack {packed}")
    return [packed, unpacked]


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


def measured(
    model: Any, files: list[Path], context: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield the row of each method behind so many tokens."""
    tokens = torch.randint(10, model.config.vocab_size, (1, context))
    room = context + arguments.turns * (WARM_UP + arguments.steps) + 1
    with contextlib.ExitStack() as stack:
        turns: dict[str, Turn] = {
            method: functools.partial(timed, step)
            for method, step in steps_of_models(model, tokens, room, stack)
        }
        for file in files:
            other = turns_of_gguf(file, tokens[0].tolist(), room, arguments.threads)
            turns[f"llama.cpp, {file.stem}"] = stack.enter_context(other)
        times = [
            {method: turn(arguments.steps) for method, turn in turns.items()}
            for _ in range(arguments.turns)
        ]
    for method in turns:
        yield {"method": method, **quietest([each[method] for each in times])}


@torch.inference_mode()
def main() -> None:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--gguf", type=Path, nargs="*")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--turns", type=int, default=TURNS)
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
    header: dict[str, Any] = {
        **provenance(),
        "device": "cpu",
        "hardware": hardware(torch.device("cpu")),
        "rates": {"host_bytes_per_s": read},
        "model": arguments.model,
        "dtype": "bfloat16",
        "repeats": arguments.turns,
        "new_tokens": arguments.steps,
        "settings": {"threads": arguments.threads, "wait_policy": os.environ["OMP_WAIT_POLICY"]},
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        files: list[Path] = []
        if importlib.util.find_spec("llama_cpp") is None:
            print("llama.cpp is left out: pip install llama-cpp-python")
        else:
            header["versions"]["llama-cpp-python"] = version("llama-cpp-python")
            files = arguments.gguf or packaged_files(arguments.model, Path(made))
        for context in arguments.contexts:
            bytes_read = step_bytes(model, context)
            bound_ms = bytes_read / read * 1e3
            print(
                f"behind {context} tokens; reading {bytes_read / 2**20:.0f} MiB alone takes",
                end=" ",
            )
            print(f"{bound_ms:.1f} ms", flush=True)
            for row in measured(model, files, context, arguments):
                rows.append(
                    {"context_tokens": context, "bytes": bytes_read, "bound_ms": bound_ms, **row}
                )
                print(f"  {row['method']:40s} {row['median_ms']:7.1f} ms (p20", end=" ")
                print(f"{row['p20_ms']:.1f}); threads {row['threads_median_ms']:.1f}", flush=True)
            if arguments.json is not None:
                document = {"header": header, "rows": rows}
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
