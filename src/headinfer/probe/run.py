"""`run_probe`: all measurements of this machine, one after the other."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import torch

import headinfer
from headinfer.device.base import Device
from headinfer.device.cpu import CpuDevice
from headinfer.device.cuda import CudaDevice
from headinfer.device.host_memory import all_host_bytes, available_host_bytes
from headinfer.device.identity import gpu_driver, identity
from headinfer.plan.measurement import Measurement, Quantity, Rate
from headinfer.probe import attention, operations
from headinfer.probe.timing import Operation, fastest
from headinfer.schedule.route import MAX_ASKED_TOKENS
from headinfer.units import parse_bytes, parse_tokens

_CPU = torch.device("cpu")

ProbeProgress = Callable[[Quantity, int | None, int, int], None]
"""Told before each measurement what it is of, its size, how many are done, and how many there are
in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """A set of sizes that follow the kind of processor.

    Attributes:
        seconds: how long each operation is repeated.
        matmul: rows and columns of the matrices.
        chunk_tokens: queries of prefill chunks, the fewest first.
        tile_tokens: keys it attends.
    """

    seconds: float
    matmul: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    tile_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """An effort: how much to measure.

    Attributes:
        quick: whether the result is to be marked as rough.
        cpu: sizes of what runs on the CPU.
        gpu: sizes of what runs on a GPU, whose rates vary less and are far higher.
        buffer_bytes: of each buffer read or copied within one memory.
        decode_tokens: contexts of the decode steps, ascending.
        copy_bytes: sizes of the copies over the link, ascending.
        host_bytes: read by the CPU in each round at least, see `beyond_caches`.
    """

    quick: bool
    cpu: Sizes
    gpu: Sizes
    buffer_bytes: int
    decode_tokens: tuple[int, ...]
    copy_bytes: tuple[int, ...]
    host_bytes: int = 0


_GPU_CHUNKS = (1024, 2048, 4096, 8192)
"""Kernels differ by them: cuDNN's serve the large ones alone."""

FULL = Effort(
    quick=False,
    cpu=Sizes(seconds=1.5, matmul=(1024, 2048, 3072), chunk_tokens=(512,), tile_tokens=4096),
    gpu=Sizes(seconds=0.3, matmul=(2048, 4096, 8192), chunk_tokens=_GPU_CHUNKS, tile_tokens=16384),
    buffer_bytes=parse_bytes("256MiB"),
    decode_tokens=tuple(map(parse_tokens, ("8K", "32K", "128K"))),
    copy_bytes=tuple(
        map(parse_bytes, ("256KiB", "1MiB", "4MiB", "16MiB", "64MiB", "256MiB")),
    ),
)
"""Half a minute on two cores."""

QUICK = Effort(
    quick=True,
    cpu=Sizes(seconds=0.1, matmul=(2048,), chunk_tokens=(512,), tile_tokens=2048),
    gpu=Sizes(seconds=0.05, matmul=(4096,), chunk_tokens=_GPU_CHUNKS, tile_tokens=16384),
    buffer_bytes=parse_bytes("128MiB"),
    decode_tokens=(parse_tokens("32K"),),
    copy_bytes=tuple(map(parse_bytes, ("1MiB", "64MiB"))),
)
"""A few seconds."""


_Make = Callable[[], dict[str, Operation]]
"""Allocates what is needed, and returns ways of doing the same."""

_WAYS = {
    Quantity.TO_DEVICE: {"to_device": True},
    Quantity.TO_HOST: {"to_host": True},
    Quantity.BOTH_WAYS: {"to_device": True, "to_host": True},
}

_OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass(frozen=True, slots=True)
class _Step:
    quantity: Quantity
    size: int | None
    make: _Make
    synchronize: Callable[[], object]
    seconds: float


def make_device(name: str) -> Device:
    """Return the CPU, or the current GPU.

    Args:
        name: "cpu", or "cuda".

    Raises:
        OptionError: CUDA was asked for and there is none.
    """
    if name == "cpu":
        return CpuDevice()
    index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return CudaDevice(torch.device("cuda", index))


@torch.no_grad()
def run_probe(
    device: Device, dtype: torch.dtype, effort: Effort, progress: ProbeProgress
) -> Measurement:
    """Measure this machine.

    A measurement that fails, for lack of memory or of an operator, is a rate that says so.

    Args:
        device: the device of the machine; the CPU where it has none.
        dtype: of matrices, keys and values.
        effort: how much to measure.
        progress: told what is being measured.
    """
    place = device.torch_device
    free_host = available_host_bytes()
    free_device = device.free_bytes()
    all_host = all_device = all_host_bytes()
    if place.type == "cuda":
        all_device = torch.cuda.get_device_properties(place).total_memory
    steps = list(_steps(device, dtype, effort))
    rates = []
    for done, step in enumerate(steps):
        progress(step.quantity, step.size, done, len(steps))
        rates.append(_rate(step))
        if place.type == "cuda":
            torch.cuda.empty_cache()  # one step's buffers must not crowd out the next one's
    return Measurement(
        identity=identity(place.type),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=effort.quick,
        dtype=str(dtype).removeprefix("torch."),
        torch_threads=torch.get_num_threads(),
        host_memory_bytes=all_host,
        host_free_bytes=free_host,
        device_memory_bytes=all_device,
        device_free_bytes=free_host if free_device is None else free_device,
        versions=_versions(),
        rates=tuple(rates),
    )


def _steps(device: Device, dtype: torch.dtype, effort: Effort) -> Iterator[_Step]:
    """Yield what to measure; where the CPU is the device, nothing is measured twice."""
    place = device.torch_device
    on_gpu = place.type == "cuda"
    sizes = effort.gpu if on_gpu else effort.cpu
    elements = effort.buffer_bytes // torch.float32.itemsize
    host_elements = max(effort.buffer_bytes, effort.host_bytes) // torch.float32.itemsize

    longest = max(effort.decode_tokens)

    def step(quantity: Quantity, make: _Make, size: int | None = None) -> _Step:
        return _Step(quantity, size, make, device.synchronize, sizes.seconds)

    def on_host(quantity: Quantity, make: _Make, size: int | None = None) -> _Step:
        return _Step(quantity, size, make, CpuDevice().synchronize, effort.cpu.seconds)

    def decode(where: torch.device, tokens: int, new_tokens: int = 1) -> _Make:
        least = effort.host_bytes if where.type == "cpu" else 0
        all_tokens = longest * -(-max(least, 1) // attention.kv_bytes(dtype, longest))
        counts = {"tokens": tokens, "all_tokens": all_tokens, "new_tokens": new_tokens}
        return partial(attention.decode, where, dtype, **counts)

    copied = elements if on_gpu else host_elements
    yield step(Quantity.DEVICE_COPY, partial(operations.copies, place, copied))
    if on_gpu:
        yield step(Quantity.DEVICE_READ, partial(operations.readers, place, elements))
    yield on_host(Quantity.HOST_READ, partial(operations.readers, _CPU, host_elements))
    yield step(Quantity.MATMUL, partial(operations.matmuls, place, dtype, sizes.matmul))
    for tokens in sizes.chunk_tokens:
        shape = {"chunk_tokens": tokens, "tile_tokens": sizes.tile_tokens}
        make = partial(attention.prefill, place, dtype, **shape)
        yield step(Quantity.PREFILL_ATTENTION, make, tokens)
    if on_gpu:
        for tokens in effort.decode_tokens:
            yield step(Quantity.DECODE_ATTENTION, decode(place, tokens), tokens)
    for tokens in effort.decode_tokens:
        yield on_host(Quantity.HOST_ATTENTION, decode(_CPU, tokens), tokens)
    yield on_host(Quantity.HOST_VERIFY, decode(_CPU, longest, MAX_ASKED_TOKENS), longest)
    if on_gpu:
        for quantity, ways in _WAYS.items():
            for size in effort.copy_bytes:
                yield step(quantity, partial(operations.link, [device], size, **ways), size)
        yield step(Quantity.HOST_SHARED, partial(operations.shared, [device], host_elements))


def _rate(step: _Step) -> Rate:
    """Measure one rate, or say why it cannot be."""
    try:
        speed, name = fastest(step.make(), step.synchronize, seconds=step.seconds)
    except Exception as error:  # whatever it is, the rest is worth measuring
        return Rate(quantity=step.quantity, size=step.size, failure=_reason(error))
    return Rate(
        quantity=step.quantity,
        size=step.size,
        typical_per_s=speed.typical_per_s,
        best_per_s=speed.best_per_s,
        reached_by=name,
    )


def _reason(error: Exception) -> str:
    """Return the first line of an error's message."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"out of memory: {first}" if isinstance(error, _OUT_OF_MEMORY) else first


def _versions() -> dict[str, str]:
    versions = {"headinfer": headinfer.__version__, "torch": torch.__version__}
    driver = gpu_driver()
    return versions | {"driver": driver} if driver else versions
