"""The probe on tiny sizes; how fast anything is, is not looked at."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from headinfer.attend.table import Kernels
from headinfer.device.identity import identity
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import OptionError
from headinfer.plan.measured import from_json
from headinfer.plan.measurement import NO_GPU, Quantity
from headinfer.probe import attention, operations
from headinfer.probe.keep import to_json
from headinfer.probe.run import FULL, QUICK, Effort, Sizes, make_device, run_probe
from headinfer.probe.timing import fastest, time_operation

TINY_SIZES = Sizes(seconds=0.0, matmul=(32, 64), chunk_tokens=(8, 16), tile_tokens=64)
TINY = Effort(
    quick=True,
    cpu=TINY_SIZES,
    gpu=TINY_SIZES,
    buffer_bytes=2**16,
    decode_tokens=(128, 512),
    copy_bytes=(2**12, 2**20),
)
ON_CPU = [
    (Quantity.DEVICE_COPY, None),
    (Quantity.HOST_READ, None),
    (Quantity.MATMUL, None),
    (Quantity.PREFILL_ATTENTION, 8),
    (Quantity.PREFILL_ATTENTION, 16),
    (Quantity.HOST_ATTENTION, 128),
    (Quantity.HOST_ATTENTION, 512),
    (Quantity.HOST_VERIFY, 512),
]

BEYOND_ADDRESSES_BYTES = 2**60
"""More than addresses reach: less than that a system may promise, and kill whoever uses it."""


def ignore(*_progress) -> None: ...


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_cpu_is_measured(dtype):
    told = []
    measurement = run_probe(make_device("cpu"), dtype, TINY, lambda *what: told.append(what))
    assert told == [(*what, done, len(ON_CPU)) for done, what in enumerate(ON_CPU)]
    assert [(rate.quantity, rate.size) for rate in measurement.rates] == ON_CPU
    for rate in measurement.rates:
        assert rate.failure is None
        assert rate.best_per_s >= rate.typical_per_s > 0
        assert rate.reached_by
    assert measurement.identity == identity("cpu")
    assert measurement.identity.gpu == NO_GPU
    assert measurement.dtype == str(dtype).removeprefix("torch.")
    assert measurement.torch_threads == torch.get_num_threads()
    assert measurement.versions["torch"] == torch.__version__
    assert (
        measurement.host_kernel
        == attention.select_kernels(
            torch.device("cpu"), dtype, attention.HEAD_DIM, attention.HEAD_DIM
        ).name
    )
    assert 0 < measurement.host_free_bytes <= measurement.host_memory_bytes
    assert measurement.device_memory_bytes == measurement.host_memory_bytes
    assert from_json(to_json(measurement)) == measurement
    assert measurement.hardware.link_bytes_per_s is None


def test_the_cpu_reads_more_than_its_caches_hold(monkeypatch):
    read = []

    def watched(make):
        def made(*args, **kwargs):
            ways = make(*args, **kwargs)
            read.extend(num_bytes for _, num_bytes in ways.values())
            return ways

        return made

    monkeypatch.setattr(operations, "readers", watched(operations.readers))
    monkeypatch.setattr(attention, "decode", watched(attention.decode))
    effort = replace(TINY, host_bytes=2**22)
    for dtype in (torch.float32, torch.bfloat16):
        measurement = run_probe(make_device("cpu"), dtype, effort, ignore)
        assert {rate.failure for rate in measurement.rates} == {None}
    assert min(read) >= 2**22


def test_the_cpu_beside_a_gpu_is_measured_as_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    measurement = run_probe(make_device("cpu"), torch.float32, TINY, ignore)
    assert measurement.identity.gpu == NO_GPU
    assert not measurement.has_device


def test_a_gpu_that_fails_everything_leaves_the_hosts_rates(monkeypatch):
    class Broken(SimulatedDevice):
        torch_device = torch.device("cuda")

        def host_empty(self, num_bytes):
            raise MemoryError("cannot lock memory")

    def fail(*_arguments, **_keywords):
        raise RuntimeError("no kernel image is available")

    for name in ("copies", "matmuls"):
        monkeypatch.setattr(operations, name, fail)
    select, readers = attention.select_kernels, operations.readers
    monkeypatch.setattr(
        attention,
        "select_kernels",
        lambda where, *kind: fail() if where.type == "cuda" else select(where, *kind),
    )
    monkeypatch.setattr(
        operations,
        "readers",
        lambda where, size: fail() if where.type == "cuda" else readers(where, size),
    )
    memory = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: memory)
    measurement = run_probe(Broken(), torch.float32, TINY, ignore)
    assert measurement.device_memory_bytes == 24 * 2**30
    failures = {(rate.quantity, rate.size): rate.failure for rate in measurement.rates}
    assert {quantity for quantity, _size in failures} == set(Quantity)
    for (quantity, size), failure in failures.items():
        if quantity in (Quantity.HOST_READ, Quantity.HOST_ATTENTION, Quantity.HOST_VERIFY):
            assert failure is None
        elif quantity is Quantity.HOST_SHARED:
            assert failure == "out of memory: cannot lock memory"
        elif quantity in (Quantity.TO_DEVICE, Quantity.TO_HOST, Quantity.BOTH_WAYS):
            assert failure == "out of memory: cannot lock memory"
            assert size in TINY.copy_bytes
        else:
            assert failure == "no kernel image is available"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            "out of memory: CUDA out of memory.",
        ),
        (MemoryError(), "out of memory: MemoryError"),
        (AttributeError("no operator 'flash'"), "no operator 'flash'"),
    ],
    ids=["device memory", "host memory", "operator"],
)
def test_a_failure_is_a_row_and_the_rest_is_measured(monkeypatch, error, reason):
    def fail(*_arguments, **_keywords):
        raise error

    monkeypatch.setattr(attention, "prefill", fail)
    measurement = run_probe(make_device("cpu"), torch.float32, TINY, ignore)
    failures = {rate.quantity: rate.failure for rate in measurement.rates if rate.failure}
    assert failures == {Quantity.PREFILL_ATTENTION: reason}
    assert measurement.missing == (Quantity.PREFILL_ATTENTION,)
    assert len(measurement.rates) == len(ON_CPU)


def test_host_memory_that_is_not_there_is_not_taken(monkeypatch):
    monkeypatch.setattr(attention, "available_host_bytes", lambda: 2**20)
    measurement = run_probe(make_device("cpu"), torch.float32, TINY, ignore)
    failures = {rate.failure for rate in measurement.rates if rate.failure}
    assert failures == {"2.00 MiB of CPU memory are needed, 1.00 MiB are free"}
    assert measurement.missing == (Quantity.HOST_ATTENTION,)


def test_memory_that_is_not_there_is_a_row():
    effort = replace(TINY, buffer_bytes=BEYOND_ADDRESSES_BYTES)
    measurement = run_probe(make_device("cpu"), torch.float32, effort, ignore)
    failures = {rate.quantity: rate.failure for rate in measurement.rates if rate.failure}
    assert set(failures) == {Quantity.DEVICE_COPY, Quantity.HOST_READ}
    assert all("can't allocate memory" in failure for failure in failures.values())


def test_an_interrupt_ends_it(monkeypatch):
    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(operations, "matmuls", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_probe(make_device("cpu"), torch.float32, TINY, ignore)


@pytest.mark.parametrize("ways", [("to_device",), ("to_host",), ("to_device", "to_host")])
def test_copies_over_the_link_cover_their_bytes(ways, monkeypatch):
    monkeypatch.setattr(operations, "_LEAST_BATCH_BYTES", 1000)
    device = SimulatedDevice()
    copied = []
    for name, stream in (("to_device", device.copy_in), ("to_host", device.copy_out)):

        def copy(target, source, name=name):
            copied.append((name, target.nbytes))
            assert target.nbytes == source.nbytes

        monkeypatch.setattr(stream, "copy", copy)
    ((run, amount),) = operations.link([device], 300, **dict.fromkeys(ways, True)).values()
    run()
    assert sorted(copied) == sorted((name, 300) for name in ways for _ in range(4))
    assert amount == 1200 * len(ways)


def test_host_memory_is_read_by_link_and_cpu_as_stated(monkeypatch):
    device, seen = SimulatedDevice(), {}

    def note(what, num_bytes):
        seen[what] = seen.get(what, 0) + num_bytes

    monkeypatch.setattr(device.copy_in, "copy", lambda to, _source: note("link", to.nbytes))
    monkeypatch.setattr(torch, "dot", lambda one, other: note("cpu", one.nbytes + other.nbytes))
    monkeypatch.setattr(torch, "mv", lambda matrix, _vector: note("cpu", matrix.nbytes))
    for name, (run, amount) in operations.shared([device], 2**16).items():
        seen.clear()
        run()
        assert amount == pytest.approx(seen["link"] + seen["cpu"], rel=0.1)
        assert seen["link"] / amount == pytest.approx(float(name.split()[1][:-1]) / 100, rel=0.1)


def test_decode_attends_every_key_once(monkeypatch):
    device, dtype = torch.device("cpu"), torch.float32
    kernels = attention.select_kernels(device, dtype, attention.HEAD_DIM, attention.HEAD_DIM)
    seen = []

    class Spy:
        name = kernels.name

        def serves(self, _work):
            return True

        def attend(self, work):
            shape = (1, attention.KV_HEADS, attention.GROUP, 1, attention.HEAD_DIM)
            assert work.query.shape == shape
            ((keys, values),) = [tile.kv for tile in work.tiles]
            seen.append((keys.storage_offset(), keys.shape, values.nbytes))
            kernels.pick(work).attend(work)

    monkeypatch.setattr(attention, "select_kernels", lambda *_kind: Kernels([Spy()]))
    ways = attention.decode(device, dtype, tokens=128, all_tokens=512)
    ((run, amount),) = ways.values()
    run()
    shape = (1, attention.KV_HEADS, 128, attention.HEAD_DIM)
    tile_bytes = attention.KV_HEADS * 128 * attention.HEAD_DIM * 4
    assert seen == [(n * 128 * attention.HEAD_DIM, shape, tile_bytes) for n in range(4)]
    assert amount == 4 * 2 * tile_bytes


def test_prefill_counts_two_products():
    ways = attention.prefill(torch.device("cpu"), torch.float32, chunk_tokens=16, tile_tokens=64)
    ((_run, amount),) = ways.values()
    assert amount == 4 * attention.KV_HEADS * attention.GROUP * 16 * 64 * attention.HEAD_DIM


def test_speeds_are_the_best_and_the_median(monkeypatch):
    # Each repeat reads the clock twice: 4 s, 1 s and 2 s.
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("headinfer.probe.timing.time.perf_counter", lambda: next(clock))
    runs = []
    speed = time_operation((lambda: runs.append(1), 8.0), lambda: None, seconds=7.0)
    assert (speed.best_per_s, speed.typical_per_s) == (8.0, 4.0)
    assert len(runs) == 4  # one to warm up


def test_the_fastest_way_counts():
    ways = {"small": (lambda: None, 1.0), "large": (lambda: None, 1e9)}
    speed, name = fastest(ways, lambda: None, seconds=0.0)
    assert name == "large"
    assert speed.best_per_s > 1e9


@pytest.mark.parametrize("effort", [QUICK, FULL], ids=["quick", "full"])
def test_the_longest_context_is_made_of_the_others(effort):
    assert all(max(effort.decode_tokens) % tokens == 0 for tokens in effort.decode_tokens)


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="CUDA is not available"):
        make_device("cuda")


def test_identity_imports_no_torch_and_then_knows_no_gpu():
    program = (
        "import sys\n"
        "from headinfer.probe import identity\n"
        "here = identity()\n"
        "assert 'torch' not in sys.modules\n"
        "assert here.gpu is None and here.cpu and here.cpu_threads >= 1\n"
        "assert identity('cpu').gpu == 'none'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_identity_is_the_gpus_once_torch_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert identity().gpu == identity("cuda").gpu == "a GPU"
    assert identity("cpu").gpu == NO_GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert identity().gpu == NO_GPU


@pytest.mark.gpu
def test_a_gpu_is_measured():
    effort = replace(QUICK, buffer_bytes=2**24, decode_tokens=(1024, 4096))
    measurement = run_probe(make_device("cuda"), torch.bfloat16, effort, ignore)
    assert {rate.failure for rate in measurement.rates} == {None}
    assert {rate.quantity for rate in measurement.rates} == set(Quantity)
    assert measurement.identity == identity("cuda")
    assert measurement.device_free_bytes <= measurement.device_memory_bytes
    hardware = measurement.hardware
    assert hardware.link_bytes_per_s > 0
    assert hardware.link_back_bytes_per_s > 0
    assert hardware.device_bytes_per_s > hardware.host_bytes_per_s
    assert from_json(to_json(measurement)) == measurement


@pytest.mark.gpu
def test_device_memory_that_is_not_there_is_a_row():
    effort = replace(QUICK, buffer_bytes=BEYOND_ADDRESSES_BYTES)
    measurement = run_probe(make_device("cuda"), torch.bfloat16, effort, ignore)
    failures = {rate.quantity: rate.failure for rate in measurement.rates}
    assert failures[Quantity.DEVICE_READ].startswith("out of memory")
    assert failures[Quantity.DEVICE_COPY].startswith("out of memory")
    assert "can't allocate memory" in failures[Quantity.HOST_READ]
    assert failures[Quantity.DECODE_ATTENTION] is None
