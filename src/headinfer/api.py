"""What users import: attach HeadInfer to a model, and detach it again."""

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from headinfer.attend.ahead import begin_preparing
from headinfer.device.make import make_devices, warn_of_options_for_a_device
from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.integration.attachment import owner_of
from headinfer.integration.cache import PrefillProgress
from headinfer.integration.placement import placement_of
from headinfer.integration.support import check_supported
from headinfer.offload import Offload
from headinfer.plan.options import Options
from headinfer.session import Session

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice

_logger = logging.getLogger(__name__)


def attach(
    model: PreTrainedModel,
    *,
    device_memory: str | int | Sequence[str | int] | None = None,
    host_memory: str | int | None = None,
    disk_cache: str | os.PathLike[str] | None = None,
    chunk_tokens: str | int = "auto",
    tile_heads: str | int = "auto",
    tile_tokens: str | int = "auto",
    device: str = "auto",
    overlap: bool = True,
    capture: bool = True,
    fuse: str = "auto",
    resident_tokens: str | int = "auto",
    draft_tokens: str | int = 0,
    host_attention: str | float = "auto",
    kv_cache: str = "auto",
    sparsity: str | float = 0.0,
    head_pattern: str | os.PathLike[str] | None = None,
    sink_tokens: str | int = "auto",
    recent_tokens: str | int = "auto",
    progress: PrefillProgress | None = None,
    simulated_device: "SimulatedDevice | Sequence[SimulatedDevice] | None" = None,
) -> Offload:
    """Serve a model's attention from CPU memory, head by head, until detached.

    Args:
        model: a loaded causal language model, in eval mode, on one device. Accelerate may have
            spread its layers over several GPUs (`device_map`), or keep weights in CPU memory.
        device_memory: the most GPU memory for the model, for example "24GiB". It holds weights, KV,
            activations and CUDA itself. Where the GPU has less free, what is free is used, as with
            None. On other devices it is a limit of their memory, and None is no limit. With layers
            on several GPUs it is for each of them, or a list has a value for each.
        host_memory: the most CPU memory for the KV caches, and for nothing else. None is what is
            free, less what the process, page tables and locked pages take. There is never more.
        disk_cache: a folder on a fast disk, for the oldest tokens that CPU memory has no room for.
            They lie in a file without a name, which goes with the process. None is no disk.
        chunk_tokens: tokens that pass through the model at once in prefill, for example "4K".
        tile_heads: KV heads of one tile: a number, "all" or "auto".
        tile_tokens: tokens of one tile: a count, "all" or "auto".
        device: "auto" for where the model is. "simulated" is a device that runs on the CPU, has
            memory of its own, and checks the order of all copies.
        overlap: False to fetch, wait and attend one tile at a time.
        capture: False to launch each kernel of a decode step by itself. Otherwise a step is
            captured, compared and replayed in one launch. Where that would change too often, or
            the CPU attends much, it is in pieces between one layer's attention and the next one's.
            On the CPU as the device, models of up to 2 GiB are captured.
        fuse: "auto" for faster parts of models in 16 bits, or "off" for the model's own. On CUDA
            a prompt's norms are one kernel of torch's and a product, and torch compiles norms and
            rotary embeddings of captured steps. On the CPU the products of few rows read weights
            at the speed of memory. Results of the two differ in their last bits.
        resident_tokens: the oldest tokens to keep in GPU memory, where they need not be fetched: a
            count, 0, "all", or "auto" for what fits in `device_memory`.
        draft_tokens: tokens of each layer that drafts attend, in copies in GPU memory. They are the
            oldest and the newest. A count, "auto" for an eighth of the context, or 0 for no drafts
            (`OffloadedCache.drafting`).
        host_attention: share of the other tokens that the CPU attends in decode steps: a number
            from 0 to 1, "off" or "auto". "auto" begins with the rates that `headinfer probe`
            measured, and goes on by who finishes first. The last bits of results may then differ
            from run to run; with a number or "off" they repeat.
        kv_cache: how a GPU's KV cache lies in CPU memory. "packed" keeps bfloat16 in three quarters
            of the bytes, with every bit the same. "int8" and "fp8" are approximate: 8 bits a value,
            and scales. "auto" is "packed" for each cache whose decode steps gain by that on one
            GPU, and "dense" for others (docs/packed.md).
        sparsity: share of the KV heads that *stream*: their queries see the first tokens and the
            newest ones alone. Approximate, and 0 by default. Half of the heads take half of the
            CPU memory and of the time of long contexts.
        head_pattern: scores by which these heads are chosen: a file of `headinfer heads`, KVzip or
            Wu et al., or a folder of DuoAttention. "random" is a pattern to measure with.
        sink_tokens: the first tokens that streaming heads see; "auto" is what the pattern says, or
            128.
        recent_tokens: the newest tokens that they see, a query's own included; "auto" is what the
            pattern says, or 256.
        progress: called during prefill with the tokens done and the tokens in all.
        simulated_device: the instance to use with `device="simulated"`, or one for each layer that
            attends, in a list in which the same may come again.

    Returns:
        The attachment; use it in a `with` statement or call its `detach`.

    Raises:
        OptionError: an option does not parse or is out of range.
        UnsupportedModelError: the model cannot be served exactly; it was not touched.
        MemoryPlanError: no plan fits the memory; the model was not touched.
    """
    options = Options.parse(
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        disk_cache=disk_cache,
        chunk_tokens=chunk_tokens,
        tile_heads=tile_heads,
        tile_tokens=tile_tokens,
        resident_tokens=resident_tokens,
        draft_tokens=draft_tokens,
        host_attention=host_attention,
        kv_cache=kv_cache,
        overlap=overlap,
        capture=capture,
        fuse=fuse,
        sparsity=sparsity,
        head_pattern=head_pattern,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )
    check_progress(progress)
    check_supported(model)
    if owner_of(model) is not None:
        raise UnsupportedModelError(
            "this model is attached already; detach it first, with headinfer.detach(model) where "
            "the handle is lost"
        )
    placement = placement_of(model)
    devices = make_devices(options.device, placement.layers, simulated_device)
    if devices[0].tiles_are_views:
        warn_of_options_for_a_device(options)
    if devices[0].torch_device.type == "cuda":
        begin_preparing()
    session = Session(model, placement, devices, options, progress=progress)
    if (less := session.host_room(0).less_than_given()) is not None:
        _logger.warning(less)
    return Offload(session)


def check_progress(progress: object) -> None:
    """Refuse what cannot be told of a prompt's progress; None is for nobody.

    Raises:
        OptionError: it cannot be called.
    """
    if progress is not None and not callable(progress):
        raise OptionError(f"progress must be a function of two counts, not {progress!r}")


def detach(model: torch.nn.Module) -> None:
    """Detach a model whose `Offload` is not at hand; one that is not attached is left as it is.

    Args:
        model: given to `attach` before.

    Raises:
        CacheStateError: called from within a call of the model.
    """
    owner = owner_of(model)
    if isinstance(owner, Session):
        owner.detach()
