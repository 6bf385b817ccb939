"""The least time of a model that lies on several GPUs. Pure arithmetic.

In a decode step one GPU works after the other where each has layers, so their times add up. Where
each has heads they work at once, and the slowest decides. A prompt's chunks follow each other
through the GPUs, so there all work at once in either case.
"""

from collections.abc import Sequence
from dataclasses import replace

from headinfer.bench.bound import Bound, Rates, Work, bound, prefill_flops
from headinfer.bench.catalogue import Spread
from headinfer.bench.held import HeldPart
from headinfer.bench.model_spec import DTYPE_BYTES, Model


def spread_decode_bound(
    model: Model,
    dtype: str,
    context_tokens: int,
    parts: Sequence[HeldPart],
    spread: Spread,
    rates: Rates,
) -> Bound:
    """Return the least time of a decode step.

    Args:
        model: the shape of the whole model.
        dtype: of weights and KV.
        context_tokens: tokens in the cache.
        parts: what each GPU has to do with the KV.
        spread: how the model lies on them.
        rates: of the machine.
    """
    flops = 2.0 * (model.layer_parameters + model.head_parameters)
    flops += model.attention_flops(context_tokens, 1)
    works = [
        Work(
            host_bytes=part.host_attended_bytes,
            device_bytes=weights + part.kv_bytes - part.host_attended_bytes,
            link_bytes=part.streamed_bytes,
            flops=flops * _share(part, parts, spread),
        )
        for part, weights in zip(parts, _weights(model, dtype, parts, spread), strict=True)
    ]
    if spread is Spread.LAYERS:
        bounds = [bound(work, rates) for work in works]
        slowest = max(bounds, key=lambda each: each.seconds)
        return replace(slowest, seconds=sum(each.seconds for each in bounds))
    return _at_once(works, rates)


def spread_prefill_bound(
    model: Model,
    dtype: str,
    context_tokens: int,
    parts: Sequence[HeldPart],
    spread: Spread,
    rates: Rates,
    *,
    kv_host_bytes: int,
) -> Bound:
    """Return the least time of a prefill.

    Args:
        model: the shape of the whole model.
        dtype: of weights and KV.
        context_tokens: tokens of the prompt.
        parts: what each GPU has to do with the KV.
        spread: how the model lies on them.
        rates: of the machine.
        kv_host_bytes: that end in host memory, of all GPUs.
    """
    flops = prefill_flops(model, context_tokens)
    kv_bytes = sum(part.kv_bytes for part in parts)
    weights = _weights(model, dtype, parts, spread)
    works = [
        Work(
            device_bytes=own,
            link_bytes=min(kv_host_bytes, kv_bytes) * part.kv_bytes / kv_bytes,
            flops=flops * _share(part, parts, spread),
        )
        for part, own in zip(parts, weights, strict=True)
    ]
    return _at_once(works, rates)


def above_disk(found: Bound, work: Work, rates: Rates) -> Bound:
    """Return a bound of several GPUs, or that of the one disk below all of them if it is later.

    Args:
        found: without the disk.
        work: of all GPUs, of which the disk's counts.
        rates: of the machine.
    """
    read_bytes, written_bytes = work.disk_read_bytes, work.disk_written_bytes
    disk = Work(disk_read_bytes=read_bytes, disk_written_bytes=written_bytes)
    return max(found, bound(disk, rates), key=lambda each: each.seconds)


def _at_once(works: Sequence[Work], rates: Rates) -> Bound:
    """Return the time of the slowest of some GPUs; host memory serves all of them together."""
    link = rates.link_bytes_per_s
    if link is not None and rates.links_bytes_per_s is not None:
        rates = replace(rates, link_bytes_per_s=min(link, rates.links_bytes_per_s / len(works)))
    by_host = sum(work.host_bytes for work in works)
    together = Work(host_bytes=by_host, link_bytes=sum(work.link_bytes for work in works))
    only_host = replace(rates, link_bytes_per_s=None)
    bounds = [bound(replace(work, host_bytes=0.0), rates) for work in works]
    return max((*bounds, bound(together, only_host)), key=lambda each: each.seconds)


def _share(part: HeldPart, parts: Sequence[HeldPart], spread: Spread) -> float:
    """Return a GPU's share of the products."""
    if spread is Spread.HEADS:
        return 1 / len(parts)
    return part.layers / sum(each.layers for each in parts)


def _weights(model: Model, dtype: str, parts: Sequence[HeldPart], spread: Spread) -> list[float]:
    """Return the bytes of weights that each GPU reads; the logits are the last one's."""
    size = DTYPE_BYTES[dtype]
    if spread is Spread.HEADS:
        every = (model.layer_parameters + model.head_parameters) * size / len(parts)
        return [every] * len(parts)
    of_layers = [model.layer_parameters * size * _share(part, parts, spread) for part in parts]
    return [*of_layers[:-1], of_layers[-1] + model.head_parameters * size]
