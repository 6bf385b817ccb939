"""The least time physics allows, from work to do and measured rates. Pure arithmetic.

A bound counts what every method must do at least. Each byte of weights and of KV is read once, and
each product of the matrix multiplications is computed once. Each offloaded byte crosses the link
once. It leaves out norms, softmax and Python, so no method reaches it; how near one comes is the
point.
"""

from dataclasses import dataclass, replace

from headinfer.bench.model_spec import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """A set of rates that a machine was measured to reach.

    Attributes:
        host_bytes_per_s: reading host memory with all cores.
        matmul_flops_per_s: multiplying matrices of the run's dtype where the model computes.
        host_shared_bytes_per_s: reading host memory by the CPU and all links at once, together;
            None without a device, or where it was not measured.
        device_bytes_per_s: reading device memory; None without a device.
        link_bytes_per_s: copying pinned host memory to the device; None without a device.
        links_bytes_per_s: copying to all GPUs of the run at once; None where it has one.
        disk_read_bytes_per_s: reading the disk below host memory; None where the run has none.
        disk_write_bytes_per_s: writing to it.
    """

    host_bytes_per_s: float
    matmul_flops_per_s: float
    device_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    host_shared_bytes_per_s: float | None = None
    links_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None
    disk_write_bytes_per_s: float | None = None

    def raised_to(self, *, disk_read_bytes_per_s: float, host_shared_bytes_per_s: float) -> "Rates":
        """Return these with other measurements where they are higher, of what was measured at all.

        A disk and memory that others share give now more and now less. The most that they were seen
        to give is the bound.
        """
        disk, shared = self.disk_read_bytes_per_s, self.host_shared_bytes_per_s
        return replace(
            self,
            disk_read_bytes_per_s=disk and max(disk, disk_read_bytes_per_s),
            host_shared_bytes_per_s=shared and max(shared, host_shared_bytes_per_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """An amount of work that must be done at least; its parts may all overlap.

    Attributes:
        host_bytes: read from host memory by the CPU.
        device_bytes: read from device memory.
        link_bytes: copied over the link, either way.
        flops: of matrix products; a multiplication and an addition are two.
        disk_read_bytes: read from the disk below host memory.
        disk_written_bytes: written to it.
    """

    host_bytes: float = 0.0
    device_bytes: float = 0.0
    link_bytes: float = 0.0
    flops: float = 0.0
    disk_read_bytes: float = 0.0
    disk_written_bytes: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A least time of some work.

    Attributes:
        seconds: the time.
        limited_by: what takes it: "host memory", "host memory and link", "device memory", "link",
            "matmul", "disk", or "disk, written".
    """

    seconds: float
    limited_by: str


def bound(work: Work, rates: Rates) -> Bound:
    """Return the time of the slowest part of `work`; work no rate is known for counts nothing."""
    both = work.host_bytes + work.link_bytes if work.host_bytes else 0.0
    parts = {
        "host memory": (work.host_bytes, rates.host_bytes_per_s),
        "host memory and link": (both, rates.host_shared_bytes_per_s),
        "device memory": (work.device_bytes, rates.device_bytes_per_s),
        "link": (work.link_bytes, rates.link_bytes_per_s),
        "matmul": (work.flops, rates.matmul_flops_per_s),
        "disk": (work.disk_read_bytes, rates.disk_read_bytes_per_s),
        "disk, written": (work.disk_written_bytes, rates.disk_write_bytes_per_s),
    }
    times = {name: amount / rate for name, (amount, rate) in parts.items() if rate}
    limited_by = max(times, key=lambda name: times[name])
    return Bound(seconds=times[limited_by], limited_by=limited_by)


def decode_work(
    model: Model,
    dtype: str,
    context_tokens: int,
    *,
    on_device: bool,
    streamed_kv_bytes: int,
    host_kv_bytes: int = 0,
    unseen_kv_bytes: int = 0,
) -> Work:
    """Return the work of one decode step: weights and KV are read once.

    Only one row of the embedding is read; the output projection is read whole.

    Args:
        model: the shape.
        dtype: of weights and KV.
        context_tokens: tokens in the cache.
        on_device: whether the model computes on a device with memory of its own.
        streamed_kv_bytes: KV bytes that are in host memory and needed on the device.
        host_kv_bytes: KV bytes that the CPU attends on behalf of the device.
        unseen_kv_bytes: KV bytes that no query sees.
    """
    weight_bytes = model.weight_bytes(dtype)
    kv_bytes = model.kv_bytes(context_tokens, dtype)
    seen = 1 - unseen_kv_bytes / kv_bytes
    read_bytes = weight_bytes + kv_bytes - unseen_kv_bytes
    flops = _product_flops(model, 1) + seen * model.attention_flops(context_tokens, 1)
    if not on_device:
        return Work(host_bytes=read_bytes, flops=flops)
    return Work(
        host_bytes=host_kv_bytes,
        device_bytes=read_bytes - host_kv_bytes,
        link_bytes=streamed_kv_bytes,
        flops=flops,
    )


def prefill_work(
    model: Model,
    dtype: str,
    context_tokens: int,
    *,
    on_device: bool,
    streamed_kv_bytes: int,
    unseen_kv_bytes: int = 0,
) -> Work:
    """Return the work of a prefill: all products once, offloaded KV to the host once.

    Args:
        model: the shape.
        dtype: of weights and KV.
        context_tokens: tokens of the prompt.
        on_device: whether the model computes on a device with memory of its own.
        streamed_kv_bytes: KV bytes that end in host memory and are made on the device.
        unseen_kv_bytes: KV bytes that the last query does not see; as large a share of attention is
            left out, though earlier queries see more.
    """
    weight_bytes = model.weight_bytes(dtype)
    unseen = unseen_kv_bytes / model.kv_bytes(context_tokens, dtype)
    flops = prefill_flops(model, context_tokens)
    flops -= unseen * model.attention_flops(0, context_tokens)
    if not on_device:
        return Work(host_bytes=weight_bytes, flops=flops)
    return Work(device_bytes=weight_bytes, link_bytes=streamed_kv_bytes, flops=flops)


def prefill_flops(model: Model, tokens: int) -> float:
    """Return the operations of a prefill whose last token's logits alone are computed.

    Each parameter takes two for each token. Causal attention takes half of the square of tokens for
    each query head and layer, in two products (scores, values) of `head_dim` each.
    """
    return _product_flops(model, tokens) + model.attention_flops(0, tokens)


def _product_flops(model: Model, tokens: int) -> float:
    return 2.0 * (model.layer_parameters * tokens + model.head_parameters)
