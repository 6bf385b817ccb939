"""Why GPUs stand idle in a prefill: when each chunk was launched and ran, and what was waited for.

    python benchmarks/gpu_prefill_trace.py --model llama-3-70b --layers 16 --gpus 2 --context 40K
    CUDA_SCALE_LAUNCH_QUEUES=1x python benchmarks/gpu_prefill_trace.py ...    # the driver's default

Random weights, layers spread over the GPUs, one prompt to warm up and one that is watched. Each
line is a chunk's part on a GPU. "launched" is the time of the thread that launches, "ran" that of
the GPU. A full queue shows as a part that takes long to launch, with little in "waited".
"""

import argparse
import dataclasses
import functools
import time
from collections import Counter
from contextlib import ExitStack, closing
from typing import Any

import torch

from headinfer.bench.build import build_model, used_devices
from headinfer.bench.catalogue import LAYERS
from headinfer.bench.limits import limit_device
from headinfer.bench.methods import METHODS
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.cli.bench_options import named_model
from headinfer.device.cuda import CudaDevice
from headinfer.device.cuda_stream import CudaEvent
from headinfer.device.regions import SpareRegions
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.busy import BusyTimes
from headinfer.kv.place import Coming
from headinfer.plan.options import Options
from headinfer.units import parse_tokens

SUSPECTS: tuple[tuple[type, str], ...] = (
    (CudaEvent, "wait"),
    (CudaDevice, "finish_compute"),
    (CudaDevice, "device_empty"),
    (SpareRegions, "take"),  # locks memory; by threads in the background, too
    (SimulatedDevice, "finish_compute"),
    (Coming, "take"),
    (torch.Tensor, "item"),
    (torch.Tensor, "tolist"),
    (torch.Tensor, "cpu"),
)
"""What may block the thread that launches."""


class Watch:
    """A watch on one prefill: parts of chunks, and what was waited for while each was launched.

    A part begins with its first attention on a GPU, as in `BusyTimes`.
    """

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.waited: Counter[str] = Counter()
        self._bases: dict[Any, tuple[float, Any]] = {}
        self._undo = ExitStack()

    def begin(self, devices: list[Any]) -> None:
        """Watch from now on; nothing is under way."""
        for device in devices:
            with device.in_use():
                base = device.compute.record(timed=True)
            device.synchronize()
            self._bases[device] = time.perf_counter(), base
        for owner, name in SUSPECTS:
            self._wrap(owner, name, self._timed)
        self._wrap(BusyTimes, "begin", self._beginning)
        self._wrap(BusyTimes, "pause", self._pausing)

    def end(self) -> None:
        """Watch no more."""
        self._undo.close()

    def seconds(self, device: Any, event: Any) -> float | None:
        """Return when a device reached an event, by the clock of the thread that launches."""
        base_s, base = self._bases[device]
        after = base.seconds_to(event)
        return None if after is None else base_s + after

    def _wrap(self, owner: type, name: str, wrapper: Any) -> None:
        own, inherited = getattr(owner, name), name not in vars(owner)
        setattr(owner, name, wrapper(f"{owner.__name__}.{name}", own))
        self._undo.callback(delattr if inherited else setattr, owner, name, *[own][inherited:])

    def _timed(self, label: str, own: Any) -> Any:
        @functools.wraps(own)
        def timed(*args: Any, **options: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return own(*args, **options)
            finally:
                self.waited[label] += time.perf_counter() - start_s

        return timed

    def _beginning(self, _label: str, own: Any) -> Any:
        def begin(busy: BusyTimes, device: Any) -> None:
            before = busy._at
            own(busy, device)
            if busy._at is not before:
                began = busy._at[1] if busy._at else None
                part = {"device": device, "began": began, "from_s": time.perf_counter()}
                self.parts.append(part | {"waited": self.waited.copy()})

        return begin

    def _pausing(self, _label: str, own: Any) -> Any:
        def pause(busy: BusyTimes) -> None:
            leaves = busy._at is not None
            own(busy)
            if leaves:
                part = self.parts[-1]
                part |= {"ended": busy._worked[-1][2], "to_s": time.perf_counter()}
                part["waited"] = self.waited - part["waited"]

        return pause


def lines(watch: Watch, devices: list[Any], start_s: float) -> list[str]:
    """Return a line for each chunk's part."""
    told, chunk = [], 0
    for part in watch.parts:
        gpu = devices.index(part["device"])
        chunk += gpu == 0
        launched = f"{part['from_s'] - start_s:8.3f} to {part['to_s'] - start_s:8.3f}"
        times = [watch.seconds(part["device"], part[name]) for name in ("began", "ended")]
        ran = " to ".join("  no time" if at is None else f"{at - start_s:8.3f}" for at in times)
        waits = ", ".join(f"{name} {s:.3f}" for name, s in part["waited"].most_common(3))
        told.append(f"{chunk:5d} {gpu:3d}   {launched}   {ran}   {waits or '-'}")
    return told


def allocations(gpus: list[torch.device]) -> str:
    """Return what torch's allocators did: a retry, and memory given back, wait for the GPU."""
    names = ("num_alloc_retries", "num_device_alloc", "num_device_free", "num_sync_all_streams")
    stats = [torch.cuda.memory_stats(gpu) for gpu in gpus if gpu.type == "cuda"]
    return ", ".join(f"{name} {[each.get(name, 0) for each in stats]}" for name in names)


@torch.no_grad()
def main() -> None:
    """Watch one prefill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-70b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--context", default="40K")
    parser.add_argument("--chunk-tokens", default="10K")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device-memory")
    parser.add_argument("--kv-cache", default="dense")
    given = parser.parse_args()
    named = named_model(given.model, given.dtype, dummy_weights=True)
    config = dict(named.config or {}) | {"num_hidden_layers": given.layers}
    if given.hidden_size is not None:
        config |= {"hidden_size": given.hidden_size, "intermediate_size": 2 * given.hidden_size}
        config |= {"head_dim": 16, "vocab_size": 96}
    planned = dataclasses.replace(named.planned, layers=named.planned.layers[: given.layers])
    named = dataclasses.replace(named, config=config, planned=planned)
    options = {"device": given.device, "chunk_tokens": given.chunk_tokens}
    options["kv_cache"] = given.kv_cache
    if given.device_memory:
        options["device_memory"] = given.device_memory
    spec = TrialSpec(
        method=LAYERS,
        context_tokens=parse_tokens(given.context),
        new_tokens=1,
        dtype=given.dtype,
        seed=0,
        model=named,
        settings=Options.parse(**options),
        fill=Fill.PREFILL,
        gpus=given.gpus,
        last_pass=False,
    )
    gpus = used_devices(spec)
    limit_device(spec.settings, gpus)
    model, _note = build_model(spec, gpus[0])
    prompt = torch.randint(config["vocab_size"], (1, spec.context_tokens), device=gpus[0])
    with closing(METHODS[LAYERS](model, spec)) as method:
        int(method.prefill(prompt, method.new_cache(spec.all_tokens)).argmax())
        cache: Any = method.new_cache(spec.all_tokens)
        devices = [part.device for part in method._offload.session.parts]  # type: ignore[attr-defined]
        before, watch = allocations(gpus), Watch()
        watch.begin(devices)
        start_s = time.perf_counter()
        try:
            method.prefill(prompt, cache)
            for device in devices:
                device.synchronize()
            seconds = time.perf_counter() - start_s
        finally:
            watch.end()
        print("chunk GPU   launched from, to (s)   ran from, to (s)   waited meanwhile (s)")
        print("\n".join(lines(watch, devices, start_s)))
        print(f"prefill {seconds:.3f} s; GPUs at work (s): {cache.stats.device_busy}")
        waits = ", ".join(f"{name} {s:.3f}" for name, s in watch.waited.most_common())
        print(f"waited in all (s): {waits}")
        if gpus[0].type == "cuda":
            print(f"before: {before}\nafter:  {allocations(gpus)}")


if __name__ == "__main__":
    main()
