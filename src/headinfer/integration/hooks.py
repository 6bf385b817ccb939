"""Hooks that others have put on a model's modules, which a replayed step would not call."""

import weakref

import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

_KINDS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = "transformers."
"""The package whose hooks belong to the model: what they do is captured with it."""


class HooksOfOthers:
    """A look at a model's modules for forward hooks that are not transformers' own.

    All modules are looked at again only where a hook was registered since, on whatever module. The
    model itself is none of them: its hooks are called around a replay as around any other call.

    Args:
        model: may go while this stays.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._seen_id = -1
        self._found: list[torch.nn.Module] = []

    def there_are_any(self) -> bool:
        """Whether there is such a hook now."""
        if any(_of_others(getattr(torch_module, f"_global{kind}", {})) for kind in _KINDS):
            return True
        if self._seen_id != RemovableHandle.next_id:
            self._seen_id = RemovableHandle.next_id
            model = self._model()
            modules = [] if model is None else model.modules()
            self._found = [each for each in modules if each is not model and _has_any(each)]
        return any(map(_has_any, self._found))


def _has_any(module: torch.nn.Module) -> bool:
    return any(_of_others(getattr(module, kind)) for kind in _KINDS)


def _of_others(hooks: dict[int, object]) -> bool:
    return any(not _module_of(hook).startswith(_OWN) for hook in hooks.values())


def _module_of(hook: object) -> str:
    return str(getattr(hook, "__module__", None) or "")
