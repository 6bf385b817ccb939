"""The norms of prompts on a GPU, in two launches and not in eight.

transformers writes a root-mean-square norm as eight operations of torch, each of which reads and
writes all activations. torch has the first seven as one kernel.

Measured beside an H200, with 1024 tokens of Llama-3-8B's shape: to launch a layer's 62 operations
took the CPU 1.2 ms. Its two norms took a quarter of that.
"""

import contextlib
import copy
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
    to compute anything else is left alone, and so is a module that has a `forward` already.

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
def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute a norm's output by torch's kernel where it serves, and as ever elsewhere."""
    weight = self._parameters.get("weight")
    if (
        weight is None  # hooks compute it
        or type(hidden_states) is not torch.Tensor  # one in shards, or of a tracer
        or hidden_states.dtype is not weight.dtype
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(hidden_states.device.type)
        or torch.compiler.is_compiling()
    ):
        output: torch.Tensor = type(self).forward(self, hidden_states)
        return output
    normalized = torch.rms_norm(hidden_states, weight.shape, None, _epsilon(self))
    return weight * normalized  # type: ignore[no-any-return]


def _epsilon(norm: Any) -> Any:
    attributes = norm.__dict__
    return attributes.get("variance_epsilon", attributes.get("eps"))


def _found(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the norms of a model that `forward` computes; those alike are tried out once."""
    tried: dict[tuple[object, ...], bool] = {}
    found = []
    for module in model.modules():
        if not _is_plain(module):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        alike = type(module), weight.shape, weight.dtype, weight.device, _epsilon(module)
        if alike not in tried:
            tried[alike] = _agrees(module, weight)
        if tried[alike]:
            found.append(module)
    return found


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a module looks like a norm with one weight for each element, in 16 bits."""
    weight = module._parameters.get("weight")
    return (
        "Norm" in type(module).__name__
        and not module._modules
        and len(module._parameters) == 1
        and type(weight) is torch.nn.Parameter
        and weight.ndim == 1
        and weight.dtype in _DTYPES
        and weight.device.type != "meta"
        and isinstance(_epsilon(module), float)
    )


@torch.no_grad()
def _agrees(norm: torch.nn.Module, weight: torch.Tensor) -> bool:
    """Whether `forward` computes what a norm's class does, with weights that are not all alike."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(weight.numel(), generator=generator).to(weight)
    tried = copy.copy(norm)
    tried._parameters = {"weight": torch.nn.Parameter(weights, requires_grad=False)}
    sizes = 2.0 ** torch.arange(-8, 8).repeat(_TRIED_ROWS // 16)[:, None]
    rows = (torch.randn(_TRIED_ROWS, weight.numel(), generator=generator) * sizes).to(weight)
    try:
        with torch.autocast(weight.device.type, enabled=False):  # or nothing would be tried
            wanted, given = type(tried).forward(tried, rows), forward(tried, rows)
    except (RuntimeError, TypeError) as error:
        _logger.info("%s computes its own norms: %s", type(norm).__name__, first_line(error))
        return False
    if given.dtype is not wanted.dtype or given.shape != wanted.shape:
        return False
    apart = (given.float() - wanted.float()).abs()
    neighbour = 2 * torch.finfo(weight.dtype).eps * wanted.float().abs()
    return bool(((apart <= neighbour).all() & ((apart > 0).float().mean() < _MOST_APART)).item())
