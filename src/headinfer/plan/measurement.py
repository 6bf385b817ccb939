"""This machine as `headinfer probe` measured it: all rates, and what the planner makes of them.

Ceilings (matrix products, reading memory) are the best that was seen: a bound that a run could beat
would be none. Rates that predict times (attention, copies over the link) are medians.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace

from headinfer.plan.hardware import THIS, DiskRate, Hardware

NO_GPU = "none"
"""Stands for the GPU's name where the CPU is the device."""


class Quantity(enum.Enum):
    """What a rate is of; counts bytes per second where nothing else is said."""

    MATMUL = "matmul"
    """Dense matrix products on the device, in FLOP/s."""
    DEVICE_COPY = "device_copy"
    """Device memory to device memory; bytes read and bytes written both count."""
    DEVICE_READ = "device_read"
    PREFILL_ATTENTION = "prefill_attention"
    """A prefill chunk against a tile of past tokens on the device, with LSE, in FLOP/s; the size is
    the tokens of the chunk."""
    DECODE_ATTENTION = "decode_attention"
    """KV attended on the device in a decode step; the size is the context in tokens."""
    TO_DEVICE = "to_device"
    """Pinned host memory to the device; the size is the bytes of one copy."""
    TO_HOST = "to_host"
    """The device to pinned host memory; the size is the bytes of one copy."""
    BOTH_WAYS = "both_ways"
    """Both at once; bytes of both directions count."""
    HOST_READ = "host_read"
    HOST_SHARED = "host_shared"
    """Host memory read by the CPU and by the link at once; bytes of both count."""
    HOST_ATTENTION = "host_attention"
    """KV attended by the CPU in a decode step; the size is the context in tokens."""
    HOST_VERIFY = "host_verify"
    """The same for `MAX_ASKED_TOKENS` new tokens at once, as where drafted ones are verified."""


CEILINGS = (Quantity.MATMUL, Quantity.DEVICE_READ, Quantity.HOST_READ, Quantity.HOST_SHARED)
"""Quantities whose best repeat counts; of all others the median counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """An identity: what tells machines apart.

    Attributes:
        cpu: the processor's name.
        cpu_threads: its hardware threads.
        gpu: the GPU's name; `NO_GPU` where the CPU is the device; None when not known.
    """

    cpu: str
    cpu_threads: int
    gpu: str | None

    @property
    def device(self) -> str:
        """The name of what computes: the GPU's, or without one the processor's."""
        return self.cpu if self.gpu in (None, NO_GPU) else self.gpu

    def matches(self, other: "Identity") -> bool:
        """Whether both may be the same machine; a GPU that is not known may be any."""
        same_gpu = self.gpu == other.gpu or None in (self.gpu, other.gpu)
        return same_gpu and (self.cpu, self.cpu_threads) == (other.cpu, other.cpu_threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A measured rate, or the reason why there is none.

    Attributes:
        quantity: what it is of.
        size: bytes of one copy, or tokens of the context or the chunk; None where neither matters.
        typical_per_s: median of all repeats; None when the measurement failed.
        best_per_s: the fastest repeat; None when the measurement failed.
        reached_by: the operation or kernel that was fastest.
        failure: why there is no rate; None when there is.
    """

    quantity: Quantity
    size: int | None = None
    typical_per_s: float | None = None
    best_per_s: float | None = None
    reached_by: str = ""
    failure: str | None = None

    @property
    def counted_per_s(self) -> float | None:
        """The rate plans count with; None when the measurement failed."""
        return self.best_per_s if self.quantity in CEILINGS else self.typical_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A measurement: all that one `headinfer probe` found.

    Attributes:
        identity: the machine.
        date: when, ISO 8601 in UTC.
        quick: whether each rate had a fraction of the usual time.
        dtype: of the matrices, keys and values.
        torch_threads: CPU threads used.
        host_memory_bytes: memory of the host, as far as this process may use it.
        host_free_bytes: what was free of it.
        device_memory_bytes: memory of the device; the host's on a CPU-only machine.
        device_free_bytes: what was free of it.
        versions: of headinfer, torch and, where there is one, NVIDIA's driver.
        rates: in the order they were measured.
        disks: that were measured here, now or before.
    """

    identity: Identity
    date: str
    quick: bool
    dtype: str
    torch_threads: int
    host_memory_bytes: int
    host_free_bytes: int
    device_memory_bytes: int
    device_free_bytes: int
    versions: Mapping[str, str]
    rates: tuple[Rate, ...]
    disks: tuple[DiskRate, ...] = ()

    def disk_rate(self, disk: str) -> DiskRate | None:
        """Return what was measured of a disk; None where nothing was."""
        return next((rate for rate in self.disks if rate.disk == disk), None)

    def keeping_disks(self, before: "Measurement | None") -> "Measurement":
        """Return this with the disks that an earlier one knows, and this one does not."""
        if before is None or not replace(before.identity, gpu=None).matches(self.identity):
            return self
        known = [rate for rate in before.disks if self.disk_rate(rate.disk) is None]
        return replace(self, disks=(*self.disks, *known))

    @property
    def has_device(self) -> bool:
        """Whether there is a device with memory of its own."""
        return self.identity.gpu != NO_GPU

    @property
    def host_kernel(self) -> str | None:
        """The attention kernel that serves decode steps on the CPU; None when it failed."""
        rates = self.rates_of(Quantity.HOST_ATTENTION)
        return rates[0].reached_by if rates else None

    def rates_of(self, quantity: Quantity) -> tuple[Rate, ...]:
        """Return the rates of a quantity that could be measured, the smallest size first."""
        found = [rate for rate in self.rates if rate.quantity is quantity and rate.best_per_s]
        return tuple(sorted(found, key=lambda rate: rate.size or 0))

    def counted_per_s(self, quantity: Quantity) -> float | None:
        """Return the rate plans count with, which is that of the largest size; None without one."""
        return next((rate.counted_per_s for rate in reversed(self.rates_of(quantity))), None)

    def best_per_s(self, quantity: Quantity) -> float | None:
        """Return the best repeat of a quantity at any size; None without one."""
        return max((rate.best_per_s or 0.0 for rate in self.rates_of(quantity)), default=None)

    @property
    def slowdown(self) -> float:
        """The most that any median lies below its best, as a part of the best: how busy it was."""
        slowdowns = [
            1 - rate.typical_per_s / rate.best_per_s
            for rate in self.rates
            if rate.typical_per_s and rate.best_per_s
        ]
        return max(slowdowns, default=0.0)

    def share_of_ceiling(self, rate: Rate) -> float | None:
        """Return a rate as a part of what bounds it; None where nothing measured does.

        What bounds attention is multiplying matrices in prefill and reading memory in decode; what
        bounds a small copy over the link is a large one.
        """
        memory = Quantity.DEVICE_READ if self.has_device else Quantity.HOST_READ
        bounds = {
            Quantity.DEVICE_COPY: (memory,),
            Quantity.PREFILL_ATTENTION: (Quantity.MATMUL,),
            Quantity.DECODE_ATTENTION: (memory,),
            Quantity.HOST_ATTENTION: (Quantity.HOST_READ,),
            Quantity.HOST_VERIFY: (Quantity.HOST_READ,),
            Quantity.HOST_SHARED: (Quantity.HOST_READ, Quantity.TO_DEVICE),
            Quantity.TO_DEVICE: (Quantity.TO_DEVICE,),
            Quantity.TO_HOST: (Quantity.TO_HOST,),
            Quantity.BOTH_WAYS: (Quantity.TO_DEVICE, Quantity.TO_HOST),
        }.get(rate.quantity, ())
        ceilings = [self.best_per_s(bound) for bound in bounds]
        if not ceilings or None in ceilings or rate.counted_per_s is None:
            return None
        return rate.counted_per_s / sum(ceiling or 0.0 for ceiling in ceilings)

    @property
    def copy_start_s(self) -> float:
        """Seconds of the smallest copy to the device beyond those its bytes take in a large one."""
        rates = self.rates_of(Quantity.TO_DEVICE)
        counted = [rate.counted_per_s for rate in rates if rate.size and rate.counted_per_s]
        if not counted:
            return 0.0
        return max((rates[0].size or 0) * (1 / counted[0] - 1 / counted[-1]), 0.0)

    @property
    def missing(self) -> tuple[Quantity, ...]:
        """What the planner needs and could not be measured."""
        needed = [Quantity.MATMUL, Quantity.PREFILL_ATTENTION, Quantity.HOST_READ]
        needed.append(Quantity.HOST_ATTENTION)
        if self.has_device:
            needed += [Quantity.DEVICE_READ, Quantity.DECODE_ATTENTION]
            needed += [Quantity.TO_DEVICE, Quantity.TO_HOST]
        return tuple(quantity for quantity in needed if not self.rates_of(quantity))

    def hardware_above(self, disk: str | None) -> Hardware | None:
        """Return `hardware` with a disk below it, as far as that was measured."""
        hardware, rate = self.hardware, self.disk_rate(disk) if disk else None
        return hardware and hardware.above_disk(rate)

    @property
    def hardware(self) -> Hardware | None:
        """The machine as the planner sees it; None while anything is `missing`."""
        if self.missing:
            return None
        memory, attention = Quantity.HOST_READ, Quantity.HOST_ATTENTION
        if self.has_device:
            memory, attention = Quantity.DEVICE_READ, Quantity.DECODE_ATTENTION
        counted = {quantity: self.counted_per_s(quantity) or 0.0 for quantity in Quantity}
        return Hardware(
            name=THIS,
            description=f"{self.identity.device}, measured {self.date[:10]}",
            device_memory_bytes=self.device_memory_bytes,
            host_memory_bytes=self.host_memory_bytes,
            matmul_flops_per_s=counted[Quantity.MATMUL],
            device_bytes_per_s=counted[memory],
            link_bytes_per_s=self.counted_per_s(Quantity.TO_DEVICE),
            link_back_bytes_per_s=self.counted_per_s(Quantity.TO_HOST),
            host_bytes_per_s=counted[Quantity.HOST_READ],
            host_shared_bytes_per_s=self.counted_per_s(Quantity.HOST_SHARED),
            prefill_attention_flops_per_s=counted[Quantity.PREFILL_ATTENTION],
            chunk_attention_flops_per_s=tuple(
                (rate.size, rate.counted_per_s)
                for rate in self.rates_of(Quantity.PREFILL_ATTENTION)
                if rate.size and rate.counted_per_s
            ),
            decode_attention_bytes_per_s=counted[attention],
            host_attention_bytes_per_s=counted[Quantity.HOST_ATTENTION],
            host_verify_bytes_per_s=self.counted_per_s(Quantity.HOST_VERIFY),
            copy_start_s=self.copy_start_s,
            measured=True,
        )
