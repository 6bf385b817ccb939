"""The hooks by which accelerate moves weights and activations of a model between devices."""

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
