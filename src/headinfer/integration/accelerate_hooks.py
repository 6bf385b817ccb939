"""The hooks by which accelerate moves weights and activations of a model between devices."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def accelerate_hooks(module: torch.nn.Module) -> list[Any]:
    """Return accelerate's hooks of a module: none, one, or those in a sequence."""
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def device_of(hook: Any) -> torch.device | None:
    """Return where a hook has its module computed; None where it does not say."""
    where = getattr(hook, "execution_device", None)
    if where is None:
        return None
    device = torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def needless_forwards(model: torch.nn.Module) -> dict[torch.nn.Module, Callable[..., Any]]:
    """Return the forwards of modules whose hooks move nothing, since one around them did.

    Accelerate gives such a hook to each module within a layer. But the layer's own has brought all
    that comes from outside, and the weights are there.

    Returns:
        What stands in front of the modules' own code, of their class.
    """
    return {
        module: module.__dict__["forward"]
        for module in _moving_nothing(model)
        if "forward" in module.__dict__ and _is_of_class(module, module.__dict__["_old_forward"])
    }


def _moving_nothing(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    where = _aligned_to(module)
    inside = [each for each in module.modules() if each is not module and accelerate_hooks(each)]
    tensors = itertools.chain(module.parameters(), module.buffers())
    if (
        where is not None
        and all(_aligned_to(each) == where and not _returns(each) for each in inside)
        and all(tensor.device == where for tensor in tensors)
    ):
        yield from inside
        return
    for child in module.children():
        yield from _moving_nothing(child)


def _aligned_to(module: torch.nn.Module) -> torch.device | None:
    """Return where a module's hook brings what it is given, if it has one that does no more."""
    hooks = accelerate_hooks(module)
    if len(hooks) != 1 or type(hooks[0]).__name__ != "AlignDevicesHook" or hooks[0].offload:
        return None
    return device_of(hooks[0])


def _returns(module: torch.nn.Module) -> bool:
    """Whether a hook sends what comes out back to where the arguments came from."""
    return any(getattr(hook, "io_same_device", False) for hook in accelerate_hooks(module))


def _is_of_class(module: torch.nn.Module, method: Any) -> bool:
    own: Any = type(module).forward
    return getattr(method, "__func__", None) is own and method.__self__ is module
