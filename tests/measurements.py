"""Measurements for tests that measure nothing."""

from dataclasses import replace

from headinfer.device.identity import identity
from headinfer.plan.measurement import NO_GPU, Identity, Measurement, Quantity, Rate


def rate(quantity: Quantity, typical: float, size: int | None = None) -> Rate:
    """A rate whose best repeat was a quarter above its median."""
    return Rate(
        quantity=quantity,
        size=size,
        typical_per_s=typical,
        best_per_s=1.25 * typical,
        reached_by="a way",
    )


CPU_ONLY = Measurement(
    identity=Identity(cpu="a processor", cpu_threads=2, gpu=NO_GPU),
    date="2026-03-01T10:00:00+00:00",
    quick=False,
    dtype="bfloat16",
    torch_threads=2,
    host_memory_bytes=16 * 2**30,
    host_free_bytes=12 * 2**30,
    device_memory_bytes=16 * 2**30,
    device_free_bytes=12 * 2**30,
    versions={"torch": "2.13.0"},
    rates=(
        rate(Quantity.DEVICE_COPY, 16e9),
        rate(Quantity.HOST_READ, 20e9),
        rate(Quantity.MATMUL, 400e9),
        rate(Quantity.PREFILL_ATTENTION, 200e9, 8192),
        rate(Quantity.PREFILL_ATTENTION, 120e9, 1024),
        rate(Quantity.HOST_ATTENTION, 12e9, 8192),
        rate(Quantity.HOST_ATTENTION, 10e9, 131072),
        rate(Quantity.HOST_VERIFY, 5e9, 131072),
    ),
)

WITH_GPU = replace(
    CPU_ONLY,
    identity=Identity(cpu="a processor", cpu_threads=2, gpu="a GPU"),
    device_memory_bytes=24 * 2**30,
    device_free_bytes=20 * 2**30,
    rates=(
        *CPU_ONLY.rates,
        rate(Quantity.DEVICE_READ, 800e9),
        rate(Quantity.DECODE_ATTENTION, 500e9, 8192),
        rate(Quantity.DECODE_ATTENTION, 600e9, 131072),
        rate(Quantity.TO_DEVICE, 20e9, 2**28),
        rate(Quantity.TO_DEVICE, 8e9, 2**18),
        rate(Quantity.TO_HOST, 18e9, 2**28),
        rate(Quantity.BOTH_WAYS, 30e9, 2**28),
        rate(Quantity.HOST_SHARED, 18e9),
    ),
)


def measured_here(measurement: Measurement) -> Measurement:
    """The same as if this machine's processor had been measured."""
    here = replace(identity("cpu"), gpu=measurement.identity.gpu)
    return replace(measurement, identity=here)


def failing(measurement: Measurement, quantity: Quantity) -> Measurement:
    """The same where one quantity could not be measured."""
    failed = Rate(quantity=quantity, failure="out of memory")
    rest = tuple(rate for rate in measurement.rates if rate.quantity is not quantity)
    return replace(measurement, rates=(*rest, failed))
