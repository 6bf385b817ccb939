"""Machines as the planner sees them: memory sizes and rates, from data sheets or measured."""

from dataclasses import dataclass, replace

from headinfer.plan.format import Format
from headinfer.schedule.route import MAX_ASKED_TOKENS

THIS = "this"
"""Name of the machine that `headinfer probe` measured."""

_COPY_START_S = 27e-6
"""What one copy over the link takes beyond its bytes.

Measured from Python with torch 2.11 beside an H100 on PCIe 5.0, in a full queue. Copies of 256 KiB
took 32 us each, 5 of them for the bytes.
"""

_PAGEABLE_SHARE = 0.5
"""Share of the link's rate that copies reach of memory that is not locked, as accelerate's are.

A rule of thumb: it was not measured here.
"""


DISK_BYTES_PER_S = 1e9
"""Bytes of weights that accelerate reads from a disk in a second, and of tokens that we do.

An assumption for all machines, below what data sheets give for any drive on PCIe: accelerate reads
through mapped memory, a tensor at a time. `headinfer probe --disk` measures the rate for tokens.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRate:
    """A disk as measured, in the sizes and the depth that tokens are moved with.

    Attributes:
        disk: what tells it from others: its device and file system.
        date: when, ISO 8601 in UTC.
        direct: whether reads and writes left out the page cache.
        read_bytes_per_s: the median of several stretches of a file.
        best_read_bytes_per_s: the fastest of them.
        write_bytes_per_s: the median.
    """

    disk: str
    date: str
    direct: bool
    read_bytes_per_s: float
    best_read_bytes_per_s: float
    write_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine: a device, its host, and the link between them.

    On a machine without a device the CPU is the device. `device_bytes_per_s` is then the rate of
    host memory. `link_bytes_per_s` is then None because nothing is copied.

    Attributes:
        name: of the preset; "this" for the machine that was measured.
        description: for people.
        device_memory_bytes: memory on the device.
        host_memory_bytes: memory of the host.
        matmul_flops_per_s: 16-bit dense matrix products on the device.
        device_bytes_per_s: reading device memory.
        link_bytes_per_s: pinned host memory to the device, one direction; None without a link.
        link_back_bytes_per_s: the device to pinned host memory; None without a link.
        host_bytes_per_s: reading host memory with all cores.
        prefill_attention_flops_per_s: fused attention of a large prefill chunk on the device.
        decode_attention_bytes_per_s: KV bytes attended on the device in a decode step.
        host_attention_bytes_per_s: KV bytes attended by the CPU in a decode step.
        host_verify_bytes_per_s: the same for `MAX_ASKED_TOKENS` new tokens at once, as where
            drafted ones are verified; None where that was not measured.
        chunk_attention_flops_per_s: the same of chunks of so many tokens, the smallest first; empty
            where it was not measured, or is the same.
        host_shared_bytes_per_s: reading host memory by the CPU and the link at once, both together;
            None where that was not measured.
        copy_start_s: what one copy over the link takes beyond its bytes.
        peer_bytes_per_s: one GPU to another, one direction; None by way of the host.
        disk_read_bytes_per_s: tokens on the disk below host memory to host memory.
        disk_write_bytes_per_s: host memory to that disk.
        disk_measured: whether the two come from `headinfer probe`, and are not assumed.
        measured: whether the rates come from `headinfer probe`, not from data sheets.
    """

    name: str
    description: str
    device_memory_bytes: int
    host_memory_bytes: int
    matmul_flops_per_s: float
    device_bytes_per_s: float
    link_bytes_per_s: float | None
    link_back_bytes_per_s: float | None
    host_bytes_per_s: float
    prefill_attention_flops_per_s: float
    decode_attention_bytes_per_s: float
    host_attention_bytes_per_s: float
    host_verify_bytes_per_s: float | None = None
    chunk_attention_flops_per_s: tuple[tuple[int, float], ...] = ()
    host_shared_bytes_per_s: float | None = None
    copy_start_s: float = _COPY_START_S
    peer_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float = DISK_BYTES_PER_S
    disk_write_bytes_per_s: float = DISK_BYTES_PER_S
    disk_measured: bool = False
    measured: bool = False

    @property
    def brought_bytes_per_s(self) -> float | None:
        """Bytes of weights that accelerate brings to a GPU in a second; None without a link."""
        return self.link_bytes_per_s and _PAGEABLE_SHARE * self.link_bytes_per_s

    def brought_s(self, brought_bytes: float, disk_bytes: float) -> float:
        """Return the seconds in which weights come to a GPU each time that tokens pass.

        Args:
            brought_bytes: all that is brought.
            disk_bytes: of that, what is read from a disk before.
        """
        rate = self.brought_bytes_per_s
        return brought_bytes / rate + disk_bytes / DISK_BYTES_PER_S if rate else 0.0

    def above_disk(self, rate: DiskRate | None) -> "Hardware":
        """Return the machine with a measured disk below its host memory; None changes nothing."""
        if rate is None:
            return self
        return replace(
            self,
            disk_read_bytes_per_s=rate.read_bytes_per_s,
            disk_write_bytes_per_s=rate.write_bytes_per_s,
            disk_measured=True,
        )

    def with_busy_links(self, gpus: int) -> "Hardware":
        """Return what each of some GPUs has while the links of all of them are busy.

        Links carry what they do alone, as far as host memory gives it. Measured beside two H100s:
        54 to 55 GB/s to one, 109 to both at once.
        """
        most = self.host_bytes_per_s / gpus
        link, back = self.link_bytes_per_s, self.link_back_bytes_per_s
        return replace(
            self,
            link_bytes_per_s=link and min(link, most),
            link_back_bytes_per_s=back and min(back, most),
        )

    def with_shared_disk(self, devices: int) -> "Hardware":
        """Return what each of some devices has while all of them use the disk."""
        return replace(
            self,
            disk_read_bytes_per_s=self.disk_read_bytes_per_s / devices,
            disk_write_bytes_per_s=self.disk_write_bytes_per_s / devices,
        )

    def shared_by(self, processes: int) -> "Hardware":
        """Return what each of some processes has, which use a GPU each and the same CPU."""
        shared, verify = self.host_shared_bytes_per_s, self.host_verify_bytes_per_s
        return replace(
            self.with_shared_disk(processes),
            host_memory_bytes=self.host_memory_bytes // processes,
            host_bytes_per_s=self.host_bytes_per_s / processes,
            host_attention_bytes_per_s=self.host_attention_bytes_per_s / processes,
            host_verify_bytes_per_s=None if verify is None else verify / processes,
            host_shared_bytes_per_s=None if shared is None else shared / processes,
        )

    @property
    def host_and_link_bytes_per_s(self) -> float:
        """Bytes that CPU and link read together; the CPU alone where that was not measured."""
        return self.host_shared_bytes_per_s or self.host_bytes_per_s

    def host_attention_at(self, new_tokens: int, form: Format = Format.DENSE) -> float:
        """Return the KV bytes that the CPU attends in a second for some new tokens at once.

        Its time for a byte grows evenly with them, from the one measured rate to the other. Both
        were measured of dense tokens.

        Args:
            new_tokens: that attend at once.
            form: in which the bytes lie.
        """
        one, most = self.host_attention_bytes_per_s, self.host_verify_bytes_per_s
        if new_tokens == 1 or most is None:
            return one * form.attended
        part = (new_tokens - 1) / (MAX_ASKED_TOKENS - 1)
        return form.attended / ((1 - part) / one + part / most)
