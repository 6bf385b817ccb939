"""The methods a benchmark compares: their names and what they are. Pure Python, never torch."""

import enum
from dataclasses import dataclass

from headinfer.errors import OptionError
from headinfer.estimate.methods import (
    ADAPTIVE,
    BOUNDED,
    CHUNKED,
    HEAD_WISE,
    HEAD_WISE_SPARSE,
    QUANTISED,
    RESIDENT,
    ROUNDED,
    STANDARD,
)
from headinfer.units import counted

REFERENCE_METHOD = STANDARD
"""The method all others are checked against and compared with."""

OFFLOADED, COMPILED = "transformers-offloaded", "standard-compiled"
HOST_ATTENTION, SYNCHRONOUS, AUTO = "host-attention", "synchronous", "headinfer"
DRAFTS = "drafts"
EAGER, UNFUSED, FIXED = "resident-eager", "resident-unfused", "resident-fixed"
STREAMING_LLM, H2O = "streaming-llm", "h2o"

ONE, LAYERS, HEADS = "one", "layers", "heads"

CHUNK_SIZES = ("4K", "8K", "16K")
"""Fixed chunks of methods that have all else on auto."""

KEPT_PERCENT = {STREAMING_LLM: 50, H2O: 50, f"{STREAMING_LLM}-25": 25, f"{H2O}-25": 25}
"""Percent of the tokens that methods keep which drop the others."""


QUANTISED_BACKENDS = {
    "quantized-quanto-4bit": ("quanto", 4),
    "quantized-hqq-8bit": ("hqq", 8),
    "quantized-fp8": ("fp8", 8),
}
"""Methods of transformers' `QuantizedCache`: the backend of each, by its name there, and bits."""


class Spread(enum.Enum):
    """How a model lies on the GPUs of a run."""

    ONE = "one"
    """All of it on the first one."""

    LAYERS = "layers"
    """Layers on each of them, in one process."""

    HEADS = "heads"
    """Heads on each of them, with a process for each: a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """A description of a method.

    Attributes:
        name: as in plans, where they know it.
        description: for people.
        exact: whether its results must be the reference's; otherwise how far they are off is told.
        is_stock: whether it runs on a stock model, and so knows no simulated device.
        is_evaluated: whether `evaluate` serves it: many lengths, several turns, going back.
        spread: how its model lies on several GPUs, where a run has several.
        needs_several: whether it is for runs with several GPUs alone.
    """

    name: str
    description: str
    exact: bool = True
    is_stock: bool = False
    is_evaluated: bool = True
    spread: Spread = Spread.ONE
    needs_several: bool = False

    @property
    def takes_forms(self) -> bool:
        """Whether the form of its KV in CPU memory can be chosen."""
        return not self.is_stock and self.name not in ROUNDED.values()


def chunked(size: str) -> str:
    """Return the name of HeadInfer with chunks of a fixed size."""
    return f"{AUTO}-chunk-{size}"


def _head_wise(heads: int) -> MethodInfo:
    return MethodInfo(
        name=f"{HEAD_WISE}-{heads}",
        description=f"the paper's head={heads}: tiles of {counted(heads, 'KV head')} x all tokens",
    )


def with_host(name: str) -> str:
    """Return the name of a method of several GPUs where the CPU attends a share."""
    return f"{name}-host"


_SEVERAL = {
    ONE: (Spread.ONE, "resident on one GPU, beside methods of several"),
    LAYERS: (Spread.LAYERS, "resident, with layers on each GPU, in one process"),
    HEADS: (Spread.HEADS, "resident, with heads on each GPU, a process for each"),
}


def _several(name: str, *, host: bool) -> MethodInfo:
    spread, description = _SEVERAL[name]
    return MethodInfo(
        name=with_host(name) if host else name,
        description=f"{description}; the CPU attends a share" if host else description,
        is_evaluated=False,
        spread=spread,
        needs_several=True,
    )


def _evicting(name: str, percent: int) -> MethodInfo:
    kept = (
        "the first tokens and the newest ones"
        if name.startswith(STREAMING_LLM)
        else "for each KV head the tokens attended most, and the newest ones"
    )
    return MethodInfo(
        name=name,
        description=f"{kept}: {percent}% in all, the others are dropped",
        exact=False,
        is_stock=True,
    )


CATALOGUE = {
    info.name: info
    for info in (
        MethodInfo(
            name=STANDARD,
            description="transformers' `DynamicCache`, the prompt in one pass",
            is_stock=True,
            spread=Spread.LAYERS,
        ),
        MethodInfo(
            name=CHUNKED,
            description="transformers with `prefill_chunk_size`",
            is_stock=True,
            spread=Spread.LAYERS,
        ),
        MethodInfo(
            name=COMPILED,
            description="transformers' `StaticCache`, decode steps by `torch.compile`",
            is_stock=True,
            is_evaluated=False,
        ),
        MethodInfo(
            name=OFFLOADED,
            description="transformers' `DynamicCache(offloading=True)`",
            is_stock=True,
        ),
        MethodInfo(
            name=QUANTISED,
            description="transformers' `QuantizedCache` in 4 bits, by optimum-quanto or HQQ",
            exact=False,
            is_stock=True,
        ),
        *(
            MethodInfo(
                name=name,
                description=f"transformers' `QuantizedCache` in {bits} bits, backend {backend}",
                exact=False,
                is_stock=True,
            )
            for name, (backend, bits) in QUANTISED_BACKENDS.items()
        ),
        *(_evicting(name, percent) for name, percent in KEPT_PERCENT.items()),
        *(_head_wise(heads) for heads in (8, 4, 2, 1)),
        MethodInfo(name=ADAPTIVE, description="the paper's adaptive: the most heads that fit"),
        MethodInfo(name=BOUNDED, description="tiles of bounded tokens too, nothing resident"),
        MethodInfo(name=RESIDENT, description="bounded, the oldest tokens kept where they fit"),
        MethodInfo(name=EAGER, description="resident, decode steps launched kernel by kernel"),
        MethodInfo(name=UNFUSED, description="resident, nothing fused in captured decode steps"),
        MethodInfo(
            name=FIXED,
            description="resident, no more tokens kept in an answer than in its prompt",
            is_evaluated=False,
        ),
        MethodInfo(
            name=HOST_ATTENTION, description="resident, the CPU attends a share in decode steps"
        ),
        MethodInfo(
            name=DRAFTS,
            description="as headinfer, the model drafts and one pass verifies: acceptance by "
            "--replay",
            is_evaluated=False,
        ),
        MethodInfo(
            name=HEAD_WISE_SPARSE,
            description="as headinfer, but half of the KV heads (or --sparsity) see sinks and a "
            "window alone",
            exact=False,
        ),
        *(
            MethodInfo(
                name=name,
                description=f"as bounded, but KV in CPU memory is rounded to {form.value}",
                exact=False,
            )
            for form, name in ROUNDED.items()
        ),
        MethodInfo(
            name=SYNCHRONOUS, description="as headinfer, but copies never overlap attention"
        ),
        MethodInfo(name=AUTO, description="HeadInfer with everything on auto"),
        *(
            MethodInfo(name=chunked(size), description=f"as headinfer, but chunks of {size} tokens")
            for size in CHUNK_SIZES
        ),
        *(_several(name, host=host) for name in _SEVERAL for host in (False, True)),
    )
}
"""All methods by name, in the order of tables."""


def spread_of(method: str, gpus: int) -> Spread:
    """Return how a method's model lies on the GPUs of a run."""
    return Spread.ONE if gpus == 1 else CATALOGUE[method].spread


def parse_methods(text: str, *, evaluated: bool = False, gpus: int = 1) -> tuple[str, ...]:
    """Return the names in a comma-separated list, or all for "all".

    Args:
        text: the list.
        evaluated: whether they are for `evaluate`, which does not serve all.
        gpus: of the run.

    Raises:
        OptionError: there is no such method, an empty name, or one that is not served.
    """
    served = tuple(
        name
        for name, info in CATALOGUE.items()
        if (info.is_evaluated or not evaluated) and (gpus > 1 or not info.needs_several)
    )
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) and any(names):
        raise OptionError(f"--methods {text!r} has a comma too many")
    names = tuple(filter(None, names))
    if names == ("all",):
        return served
    for name in names:
        if name not in CATALOGUE:
            known = ", ".join((*served, "all"))
            raise OptionError(f"there is no method {name!r}; choose among {known}")
        if gpus == 1 and CATALOGUE[name].needs_several:
            raise OptionError(
                f"method {name!r} needs several GPUs; give `headinfer bench` --gpus 2, or leave it "
                "out"
            )
        if name not in served:
            raise OptionError(
                f"method {name!r} cannot be evaluated: it is for timing alone; leave it out, and "
                "time it with `headinfer bench decode`"
            )
    return names
