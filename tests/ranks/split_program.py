"""What each rank of a split model does in the tests: run by torchrun, with a folder of models.

The names of parts may follow: they alone are run. `rank<n>.pt` of the folder has all that was got.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
from split_models import (
    ABOVE_DISK,
    DEVICES,
    GPU_DEVICES,
    LATE_RUN,
    LONG,
    MODELS,
    ON,
    ON_GPUS,
    PATTERN,
    STREAMED,
    STREAMED_RUNS,
    STREAMED_TOKENS,
    UNEVEN,
    VOCABULARY,
    answers,
    few_are_steady,
    last_logits,
    logits,
    prompt,
    two_caches,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import headinfer
from headinfer.bench.fill import fill_randomly
from headinfer.engine.ready_tokens import ReadyTokens
from headinfer.integration import disk_below
from headinfer.ranks.leaving import leave_together
from saved_models import make_tokenizer
from tiny_models import random_tokens

warnings.filterwarnings("ignore")
_logger = logging.getLogger("headinfer")


def load(folder: Path, name: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder / name,
        distributed_config=DistributedConfig(tp_plan="auto"),
        dtype=torch.float32,
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def failure_of(work: Any) -> str:
    """Return the kind and the words of what is raised; empty for nothing."""
    try:
        work()
    except headinfer.HeadInferError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def parity(folder: Path, got: dict[str, Any]) -> None:
    for name in MODELS:
        model = load(folder, name)
        on = ON_GPUS if torch.cuda.is_available() else ON
        for device in (device for each, device in on if each == name):
            options = (DEVICES | GPU_DEVICES)[device]
            with headinfer.attach(model, device=device.split()[0], **options) as offload:
                got[f"{name} {device}"] = answers(model, lambda: offload.new_cache().as_keyword())
                got[f"{name} {device} logits"] = logits(model, offload.new_cache().as_keyword())
                got[f"{name} {device} kv_heads"] = [
                    layer.kv_heads for layer in offload.plan.shape.layers
                ]
                got[f"{name} {device} captured"] = offload.stats.captured_steps
                cache = offload.new_cache()
                model(prompt(1).to(model.device), **cache.as_keyword())
                got[f"{name} {device} keys"] = cache.layers[0].keys.cpu()
                got[f"{name} {device} host bytes"] = offload.stats.host_kv_bytes
                filled = offload.new_cache()
                fill_randomly(model, filled, 40, seed=1)
                got[f"{name} {device} filled"] = filled.layers[0].keys.cpu()


def patterns(folder: Path, got: dict[str, Any]) -> None:
    model = load(folder, "llama3")
    with headinfer.attach(model, chunk_tokens=16, **PATTERN) as offload:
        got["streaming"] = [
            None if layer.streaming is None else layer.streaming.heads
            for layer in offload.plan.shape.layers
        ]
        got["pattern logits"] = logits(model, offload.new_cache().as_keyword())


def uneven_pattern(folder: Path, got: dict[str, Any]) -> None:
    """All heads of the second rank stream, which so needs no CPU memory."""
    model = load(folder, "llama3")
    for device, options in DEVICES.items():
        asked = options | UNEVEN | {"head_pattern": folder / "uneven.json"}
        with headinfer.attach(model, device=device, **asked) as offload:
            got[f"uneven {device}"] = last_logits(model, offload.new_cache().as_keyword())


def other_splits(folder: Path, got: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "llama3", dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    got["FSDP"] = failure_of(lambda: headinfer.attach(model, device="cpu"))


def agreement(folder: Path, got: dict[str, Any]) -> None:
    """Ranks that differ: each is the one that has more, or less, in turn."""
    model, rank = load(folder, "llama3"), distributed.get_rank()
    with headinfer.attach(model, chunk_tokens=(32, 16)[rank]) as offload:
        got["own chunks"] = answers(model, lambda: offload.new_cache().as_keyword())
    with headinfer.attach(model, host_memory="1GiB") as offload:
        room = offload.session.host_room(0)
        got["host room"] = room.all_bytes, room.given_bytes
    torchruns = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = "4"  # as if there were two models, in two ranks each
    with headinfer.attach(model, host_memory="1GiB") as offload:
        got["host room beside others"] = offload.session.host_room(0).given_bytes
    os.environ["LOCAL_WORLD_SIZE"] = torchruns
    with headinfer.attach(model, host_memory=("1GiB", "1KiB")[rank]) as offload:
        got["host memory"] = failure_of(
            lambda: model(prompt(1).to(model.device), **offload.new_cache().as_keyword())
        )
    got["device memory"] = failure_of(
        lambda: headinfer.attach(model, device_memory=("100KiB", "1GiB")[rank])
    )
    with headinfer.attach(model) as offload:
        got["other tokens"] = failure_of(
            lambda: model(prompt(1).to(model.device) + rank, **offload.new_cache().as_keyword())
        )
        got["clock"] = failure_of(
            lambda: list(
                headinfer.generate(
                    model, [5, 6], tokenizer=make_tokenizer(VOCABULARY), max_time=1.0
                )
            )
        )


def stopping(folder: Path, got: dict[str, Any]) -> None:
    """A stream that one rank closes early, while the other would go on."""
    model, rank = load(folder, "llama3"), distributed.get_rank()
    stream = headinfer.generate(
        model,
        prompt(1)[0].tolist(),
        tokenizer=make_tokenizer(VOCABULARY),
        max_new_tokens=400,
        chunk_tokens=16,
    )
    tokens = 0
    for record in stream:
        tokens = record.tokens
        if rank == 0 and tokens >= 3:
            stream.close()
            break
    got["stopped after"] = tokens


def streamed_late(folder: Path, got: dict[str, Any]) -> None:
    """Steps that one rank is ready to stream in one launch later than the other."""
    streamed_in_one_launch(folder, got, [LATE_RUN])


def streamed_in_one_launch(
    folder: Path, got: dict[str, Any], runs: list[tuple[str, bool]] = STREAMED_RUNS
) -> None:
    """Streamed steps; then with a rank whose CPU's share is settled later than the other's."""
    few_are_steady()
    model, rank = load(folder, "llama3"), distributed.get_rank()
    tokens, settings = prompt(1).to(model.device), {"max_new_tokens": STREAMED_TOKENS}
    device = "cuda" if torch.cuda.is_available() else "simulated"
    own = ReadyTokens.may_capture_streamed
    for name, late in runs:
        calls = iter(range(10**6))

        def settled(engine: Any, share_changes: int, calls: Any = calls, late: bool = late) -> bool:
            return next(calls) >= (30 if late and rank else 0) and own(engine, share_changes)

        ReadyTokens.may_capture_streamed = settled
        with headinfer.attach(model, device=device, **STREAMED[name]) as offload:
            cache = offload.new_cache()
            ids = model.generate(
                tokens, do_sample=False, pad_token_id=0, **cache.as_keyword(), **settings
            )
            forms = {form.name for _, form in cache.state.engine.captured}
            got[f"{name} {late} streamed"] = ids.cpu(), forms, offload.stats.captured_steps
    ReadyTokens.may_capture_streamed = own


def above_disk(folder: Path, got: dict[str, Any]) -> None:
    """Tokens on a disk; then ranks of which one has less memory, or less disk, or no folder."""
    model, rank = load(folder, "llama3"), distributed.get_rank()
    above = ABOVE_DISK | ({"device": "cuda"} if torch.cuda.is_available() else {})
    below = {**above, "disk_cache": folder}
    with headinfer.attach(model, **above) as offload:
        got["in memory"] = two_caches(model, offload)
    for name, memory in (("alike", ("1400KiB",) * 2), ("apart", ("2MiB", "1200KiB"))):
        with headinfer.attach(model, **below, host_memory=memory[rank]) as offload:
            got[f"on disk {name}"] = two_caches(model, offload)
            got[f"on disk {name} bytes"] = offload.stats.bytes_from_disk
            got[f"on disk {name} held"] = offload.stats.host_kv_bytes
    with headinfer.attach(model, **below, host_memory="600KiB") as offload:
        free, here = disk_below.free_bytes, (500 * 1024, 2**30)[rank]
        disk_below.free_bytes = lambda _folder: here
        got["full disk"] = failure_of(
            lambda: model(
                random_tokens(1, LONG).to(model.device), **offload.new_cache(LONG).as_keyword()
            )
        )
        disk_below.free_bytes = free
    missing = {**below, "disk_cache": (folder, folder / "missing")[rank]}
    got["no folder"] = failure_of(lambda: headinfer.attach(model, **missing))
    on_cpu = {"device": "cpu", "disk_cache": missing["disk_cache"]}  # which has been measured, too
    got["no folder on the CPU"] = failure_of(lambda: headinfer.attach(model, **on_cpu))
    got["files"] = [each.name for each in folder.iterdir() if each.is_file()]


def heads(folder: Path, got: dict[str, Any]) -> None:
    model = load(folder, "one-kv-head")
    got["one head"] = failure_of(lambda: headinfer.attach(model))


PARTS = (
    parity,
    patterns,
    uneven_pattern,
    other_splits,
    agreement,
    above_disk,
    stopping,
    heads,
    streamed_late,
)
ALONE = (streamed_in_one_launch,)
"""Parts that are run where they are asked for."""


def main() -> None:
    folder, asked = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    got: dict[str, Any] = {}
    for part in PARTS + ALONE:
        if part.__name__ in asked or (not asked and part in PARTS):
            part(folder, got)
    torch.save(got, folder / f"rank{distributed.get_rank()}.pt")
    leave_together()


if __name__ == "__main__":
    main()
