"""The norms of prompts on a GPU, in two launches and not in eight.

transformers writes a root-mean-square norm as eight operations of torch, each of which reads and
writes all activations. torch has the first seven as one kernel.
"""

import contextlib
import copy
import inspect
import logging
import types
import weakref
from typing import Any

import torch

from headinfer.integration.forward import OwnForwards
from headinfer.integration.said import first_line
from headinfer.schedule.route import MAX_ASKED_TOKENS

_logger = logging.getLogger(__name__)

_DTYPES = frozenset({torch.float16, torch.bfloat16})

_TRIED_ROWS = 64
"""Rows that are tried out, of 16 sizes."""

_MOST_APART = 0.01
"""The share of elements that may be rounded to a neighbour, as sums have another order."""


class PromptNorms:
    """A model's norms as computed by torch's own kernel, in place only during prompts.

    They round as the model's code does: what is normalized to 16 bits, then its product with the
    weight. Only the sum of squares, in float32, has another order. A class of norms that turns out
    to compute anything else is left alone. So is a module that has a `forward` already, as
    accelerate gives it.

    Args:
        model: may go while this stays.
        enabled: whether to compute anything so.
    """

    def __init__(self, model: torch.nn.Module, *, enabled: bool) -> None:
        self._model = weakref.ref(model)
        self._enabled = enabled
        self._forwards: OwnForwards | None = None

    def on(self, batch: int, new_tokens: int) -> contextlib.AbstractContextManager[object]:
        """Have the norms compute so until the `with` statement ends, if tokens are a prompt's.

        Args:
            batch: rows of the call.
            new_tokens: of each row. A step's few have other forms; see `FusedParts`.
        """
        if not self._enabled or not batch or new_tokens <= MAX_ASKED_TOKENS:
            return contextlib.nullcontext()
        if self._forwards is None:
            model = self._model()
            norms = [] if model is None else _found(model)
            self._forwards = OwnForwards([types.MethodType(forward, norm) for norm in norms])
        return self._forwards.on()


# Its name is that of the method it stands for: what is pickled meanwhile has that method.
def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute a norm's output by torch's kernel where it serves, and as ever elsewhere."""
    weight = self._parameters.get("weight")
    if (
        len(args) != 1
        or kwargs
        or weight is None  # hooks compute it
        or type(args[0]) is not torch.Tensor  # one in shards, or of a tracer
        or args[0].dtype is not weight.dtype
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(args[0].device.type)
        or torch.compiler.is_compiling()
    ):
        output: torch.Tensor = type(self).forward(self, *args, **kwargs)
        return output
    return _computed(args[0], weight, _epsilon(self))


def _computed(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return weight * torch.rms_norm(states, weight.shape, None, epsilon)


def _epsilon(norm: Any) -> Any:
    attributes = norm.__dict__
    return attributes.get("variance_epsilon", attributes.get("eps"))


def _found(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the norms of a model that are computed so; those alike are tried out once."""
    tried: dict[tuple[object, ...], bool] = {}
    found = []
    for module in model.modules():
        if not _is_plain(module):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        values = vars(module).items()
        own = [(name, value) for name, value in values if isinstance(value, int | float | str)]
        alike = type(module), weight.shape, weight.dtype, weight.device, *own
        if alike not in tried:
            tried[alike] = _agrees(module, weight)
        if tried[alike]:
            found.append(module)
    return found


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a norm: by its name, and with nothing but vectors in it."""
    alone = next(module.children(), None) is None
    vectors = all(part.ndim == 1 for part in module.parameters(recurse=False))
    return alone and vectors and "Norm" in type(module).__name__


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a norm has a weight in 16 bits for each element, and nothing else."""
    weight = module._parameters.get("weight")
    return (
        is_norm(module)
        and len(module._parameters) == 1
        and type(weight) is torch.nn.Parameter
        and weight.dtype in _DTYPES
        and weight.device.type != "meta"
        and isinstance(_epsilon(module), float)
    )


@torch.no_grad()
def _agrees(norm: torch.nn.Module, weight: torch.Tensor) -> bool:
    """Whether a norm's class computes the same, with weights that are not all alike."""
    if len(inspect.signature(type(norm).forward).parameters) != 2:  # with `self`: some take a gate
        return False
    try:
        with torch.device("cpu"):
            generator = torch.Generator("cpu").manual_seed(0)
            weights = torch.rand(weight.numel(), generator=generator).to(weight)
            sizes = 2.0 ** torch.arange(-8, 8).repeat(_TRIED_ROWS // 16)[:, None]
            rows = torch.randn(1, _TRIED_ROWS, weight.numel(), generator=generator) * sizes
        tried, rows = copy.copy(norm), rows.to(weight)
        tried._parameters = {"weight": torch.nn.Parameter(weights, requires_grad=False)}
        with torch.autocast(weight.device.type, enabled=False):
            wanted = type(tried).forward(tried, rows)
            given = _computed(rows, weights, _epsilon(norm))
        if given.dtype is not wanted.dtype or given.shape != wanted.shape:
            return False
        apart = (given.float() - wanted.float()).abs()
        near = apart <= 2 * torch.finfo(weight.dtype).eps * wanted.float().abs()
        return bool((near.all() & ((apart > 0).float().mean() < _MOST_APART)).item())
    except Exception as error:  # of whatever kind a class of somebody's raises
        _logger.info("%s computes its own norms: %s", type(norm).__name__, first_line(error))
        return False
