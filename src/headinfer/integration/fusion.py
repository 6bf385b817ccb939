"""Fewer kernels in a captured step: norms, rotary embeddings and gated layers, compiled by torch.

A norm of one token in bfloat16 takes eight kernels and a rotary embedding ten, each of which does
next to nothing. `torch.compile` makes one of them, from the model's own code. It rounds to 16 bits
less often than that code does.

Compiling takes some seconds in the first process on a machine. torch keeps the result on disk.
"""

import contextlib
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from headinfer.device.base import CaptureError
from headinfer.integration.accelerate_hooks import needless_forwards
from headinfer.integration.compiler import CompilerImport, begin_import
from headinfer.integration.forward import OwnForwards
from headinfer.integration.norms import is_norm
from headinfer.integration.outputs import are_near
from headinfer.integration.said import first_line

_logger = logging.getLogger(__name__)

_ROTARY = "apply_rotary"
"""How transformers' functions begin that rotate queries and keys."""

_PROJECTIONS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""The products of a gated feed-forward layer, under transformers' names."""


class Fusion:
    """A choice to fuse small parts of captured steps, until a trial shows that they cannot be.

    Args:
        model: may go while this stays.
        enabled: whether to fuse at all.
    """

    def __init__(self, model: torch.nn.Module, *, enabled: bool) -> None:
        self._parts = FusedParts(model) if enabled else None
        self._works = False
        self._import = CompilerImport()

    @property
    def untried(self) -> bool:
        """Whether a trial is to come."""
        return self._parts is not None and not self._works

    def chunk_launched(self, *, more: bool) -> None:
        """Prepare for steps to come, behind a chunk's launches; see `CompilerImport`."""
        if self.untried:
            self._import.chunk_launched(more=more)

    def step_begins(self) -> None:
        """Prepare for steps to come: this is the first of them."""
        if self.untried:
            begin_import()

    def on(self) -> contextlib.AbstractContextManager[None]:
        """Have what is fused computed so until the `with` statement ends."""
        return contextlib.nullcontext() if self._parts is None else self._parts.on()

    def try_out(self, run: Callable[[], Any]) -> None:
        """Have what is fused compiled, in a first run; fuse nothing where that fails.

        A capture and what it is compared with are fused alike, so that this alone finds a fault.

        Args:
            run: runs a step in the form to be captured, under `on`, and returns its output.
        """
        begin_import().join()
        _logger.info("torch compiles what is fused in decode steps; fuse='off' goes without")
        fused, outputs = self._parts, []
        try:
            for parts in (None, fused):
                self._parts = parts
                outputs.append(run())
            if not are_near(*outputs):
                raise RuntimeError("fused, they give other results")
            self._works = True
        except CaptureError:
            self._parts = fused  # the step is none for a capture, whose form comes next
        except Exception as error:
            self._parts = None
            _logger.warning("nothing is fused in decode steps: %s", first_line(error))
        except BaseException:
            self._parts = fused
            raise


class FusedParts:
    """A model's small parts in their compiled form, in place only during some calls.

    They stand in the instances' own `forward`. A part that has one already is left alone. But where
    that is one of accelerate's that moves nothing, it goes away meanwhile.

    Args:
        model: may go while this stays.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)

    def on(self) -> contextlib.AbstractContextManager[None]:
        """Have the parts compute in their compiled form until the `with` statement ends."""
        return self._forwards.on()

    @functools.cached_property
    def _forwards(self) -> OwnForwards:
        model, methods = self._model(), []
        if model is None:
            return OwnForwards([])
        for module in model.modules():
            module_class: Any = type(module)
            if (forward := _fused_forward(module_class, _kind(module))) is not None:
                methods.append(types.MethodType(forward, module))
        return OwnForwards(methods, needless_forwards(model))


def _kind(module: torch.nn.Module) -> str:
    """Return what a module is that can be compiled: a norm, or gated, or maybe attention."""
    children = dict(module.named_children())
    if not children:
        return "norm" if is_norm(module) else ""
    products = [children.pop(name, None) for name in _PROJECTIONS]
    if children.keys() <= {"act_fn"} and all(type(each) is torch.nn.Linear for each in products):
        return "gated"
    return "attention"


@functools.cache
def _fused_forward(module_class: Any, kind: str) -> Callable[..., Any] | None:
    """Return a class's forward with what is small in it compiled; None where there is nothing."""
    if kind in ("norm", "gated"):
        compiled: Callable[..., Any] = torch.compile(module_class.forward)
        return compiled
    forward = inspect.unwrap(module_class.forward) if kind else None
    if not isinstance(forward, types.FunctionType):
        return None
    rotary = {
        name: torch.compile(function)
        for name in forward.__code__.co_names
        if name.startswith(_ROTARY) and callable(function := forward.__globals__.get(name))
    }
    if not rotary:
        return None
    # The same code with other functions under these names: no module of transformers is changed.
    fused = types.FunctionType(
        *(forward.__code__, {**forward.__globals__, **rotary}, forward.__name__),
        *(forward.__defaults__, forward.__closure__),
    )
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused
