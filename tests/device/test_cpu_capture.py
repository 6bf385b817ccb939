"""What a capture on the CPU does again: the bits that a call gives, for whatever is in memory."""

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from headinfer.device import elementwise, tape
from headinfer.device.base import CaptureError
from headinfer.device.cpu import CpuDevice
from headinfer.products.few_rows import few_rows_library, product

Work = Callable[[torch.Tensor, torch.Tensor], Any]


def half_rotated(x: torch.Tensor) -> torch.Tensor:
    middle = x.shape[-1] // 2
    return torch.cat((-x[..., middle:], x[..., :middle]), dim=-1)


def norm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y[..., :1] * wide.to(x.dtype)


def rotated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    queries = x.unflatten(-1, (3, -1)).transpose(1, 2)
    angles = torch.linspace(0, 3, queries.shape[-1])
    return queries * angles.cos().to(x.dtype) + half_rotated(queries) * angles.sin().to(x.dtype)


def changed_in_place(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(x)
    result[..., 1::2] = y[..., 1::2]
    return result.add_(x).mul_(0.37)


WORKS: dict[str, Work] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y,
    "numbers": lambda x, y: (x * 0.1 + 3) / 0.7 - 1,
    "rounded numbers": lambda x, y: (x + 0.1, y - 0.3, 0.7 - x, x.add(y, alpha=0.3)),
    "mean of all": lambda x, y: x.float().mean(None, keepdim=True) + y,
    "broadcast": lambda x, y: x[:, :1] * y + y[..., 2:3],
    "wider": lambda x, y: x * y.float() + 0.3,
    "a number in a tensor": lambda x, y: x * torch.tensor(1.3) + torch.tensor(2),
    "whole numbers": lambda x, y: x + torch.arange(x.shape[-1]),
    "negate": lambda x, y: -x,
    "square": lambda x, y: x.pow(2) + y**3,
    "rsqrt": lambda x, y: torch.rsqrt(x.abs()),
    "other dtypes": lambda x, y: (x.float(), x.half(), x.bfloat16(), x.double(), x > y),
    "strides": lambda x, y: x.mT.contiguous() + y.mT,
    "join": lambda x, y: torch.cat((x[..., 1:], y, x[..., :0]), -1),
    "norm": norm,
    "rotate": rotated,
    "in place": changed_in_place,
    "activations": lambda x, y: (functional.silu(x), functional.gelu(y, approximate="tanh")),
    "several": lambda x, y: torch.topk(x.float().softmax(-1) + y, 2),
    "views": lambda x, y: (x.reshape(-1)[3:], y.chunk(2, -1)),
}


def filled(dtype: torch.dtype, seed: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, *shape, generator=generator) * 3
    return x.to(dtype), y.to(dtype)


def bits(result: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf.contiguous().view(torch.uint8).clone() for leaf in leaves]


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(1, 1, 576), (2, 3, 1539), (1, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_a_replay_gives_the_bits_of_a_call(
    work: Work, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if work is rotated and shape[-1] % 6:
        pytest.skip("no even heads")
    with torch.inference_mode() if dtype is torch.bfloat16 else torch.no_grad():
        memory = filled(dtype, 1, shape)
        capture = CpuDevice().capture(lambda: work(*memory))
        for seed in (1, 2):
            for place, contents in zip(memory, filled(dtype, seed, shape), strict=True):
                place.copy_(contents)
            wanted = bits(work(*memory))
            assert all(map(torch.equal, bits(capture.replay()), wanted))


@pytest.fixture
def flushed() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


@pytest.mark.covering
@pytest.mark.usefixtures("flushed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [functional.silu, functional.gelu])
@pytest.mark.parametrize("size", [2**14, 63])
def test_an_activation_has_the_bits_of_a_call_for_each_value(
    activation: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, size: int
) -> None:
    """Also where the tiny ones among them are 0, which users may choose at any time."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    memory = torch.empty(size, dtype=dtype)
    capture = CpuDevice().capture(lambda: activation(memory))
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        for some in values.split(size):
            memory[: len(some)].copy_(some)
            assert all(map(torch.equal, bits(capture.replay()), bits(activation(memory))))


def test_threads_that_stay_awake_do_all_of_each_product(other_threads: int) -> None:
    """More threads than cores: some come late to a task, or when it is over."""
    sizes = (65, 1031, 400, 2051, 65)
    weights = [
        torch.randn(out, size, generator=torch.Generator().manual_seed(out)).bfloat16() / size**0.5
        for size, out in itertools.pairwise(sizes)
    ]
    (x, _), device = filled(torch.bfloat16, 1, (1, sizes[0])), CpuDevice()

    def work() -> torch.Tensor:
        y = x
        for weight in weights * 3:
            made = product(y, weight, None)
            if made is None:
                pytest.skip("no compiler")
            device.launch(made)
            y = made.output + 0.5
        return y

    capture = device.capture(work)
    for seed in range(100):
        x.copy_(filled(torch.bfloat16, seed, x.shape)[0])
        assert all(map(torch.equal, bits(capture.replay()), bits(work())))
    assert torch.get_num_threads() == other_threads


def test_without_a_compiler_torch_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "compile_kernel", lambda *_, **__: None)
    found_before = tape.tape_library, elementwise._lanes
    for found in found_before:
        found.cache_clear()
    try:
        test_a_replay_gives_the_bits_of_a_call(norm, torch.bfloat16, (1, 1, 576))
    finally:
        for found in found_before:
            found.cache_clear()


READINGS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("read", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_reads_back_is_refused(read: Callable[[torch.Tensor], object], mode: Any) -> None:
    device, x = CpuDevice(), torch.randn(7)
    with mode(), pytest.raises(CaptureError, match="reads back"):
        device.capture(lambda: read(x * 2))
    assert device.capture(lambda: x + 1).replay().shape == x.shape


def test_launches_and_what_is_aside_are_called_in_order() -> None:
    device, x, said = CpuDevice(), torch.zeros(3), list[str]()

    def work() -> torch.Tensor:
        x.add_(1)
        device.launch(lambda: said.append(f"launch {x.sum().item():.0f}"))
        y = x * 2
        device.aside(lambda: said.append(f"aside {y.sum().item():.0f}"))
        return y + 1

    capture = device.capture(work)
    assert said == ["launch 3"]
    capture.replay()
    assert said[1:] == ["launch 6", "aside 12"]
    device.launch(lambda: said.append("alone"))
    device.aside(lambda: said.append("too"))
    assert said[3:] == ["alone", "too"]


def test_a_capture_keeps_what_it_needs() -> None:
    def made() -> Any:
        x, y = torch.full((700,), 3.0), torch.full((700,), 4.0)
        return CpuDevice().capture(lambda: x * y + 1)

    capture = made()
    others = [torch.full((700,), 9.0) for _ in range(50)]
    assert capture.replay().eq(13).all()
    assert others


@pytest.fixture
def other_threads() -> Iterator[int]:
    """Have torch use another number of threads than the environment says."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    yield before + 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("how", ["capture", "product"])
def test_a_fresh_thread_computes_on_as_many_threads_as_torch(how: str, other_threads: int) -> None:
    """Where nothing of torch's has run in it before."""
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    library, work = few_rows_library(torch.bfloat16, 1), product(x, weight, None)
    if library is None or work is None:
        pytest.skip("no compiler")
    captured = CpuDevice().capture(lambda: x * 2)
    run = captured.replay if how == "capture" else work
    told: list[int] = []

    def compute() -> None:
        told.append(library.omp_get_max_threads())
        run()
        told.append(library.omp_get_max_threads())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert told[0] != other_threads, "what the environment says"
    assert told[1] == other_threads
