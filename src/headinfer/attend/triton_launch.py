"""Launching Triton programs at little cost to the host."""

from typing import Any

import torch
from triton.compiler import CompiledKernel

_ALIGNMENT_BYTES = 16
_MAX_INT32 = 2**31 - 1


class Program:
    """A jitted program that finds its compiled variant once, not at each launch.

    Triton looks it up by every argument, which took 60 us of the host's time beside an H100, six
    times what the launch takes; a decode step makes 64 launches and more.

    Args:
        jitted: the program; its parameters are pointers, numbers it does not specialise on,
            strides, and constants, in this order.
        options: Triton's, such as `num_warps`.
    """

    def __init__(self, jitted: Any, **options: int) -> None:
        self._jitted = jitted
        self._options = options
        self._variants: dict[tuple[object, ...], Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        strides: tuple[int, ...],
        constants: tuple[object, ...],
    ) -> None:
        """Enqueue the program on the current stream of the tensors' device."""
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, tensors, numbers, strides, constants)
        else:
            self._launch(grid, tensors, numbers, strides, constants)

    def _launch(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[float, ...],
        strides: tuple[int, ...],
        constants: tuple[object, ...],
    ) -> None:
        # What Triton compiles for: types, and of pointers and strides what it specialises on.
        kinds = [(t.dtype, t.data_ptr() % _ALIGNMENT_BYTES == 0) for t in tensors]
        steps = [(n == 1, n % _ALIGNMENT_BYTES == 0, n > _MAX_INT32) for n in strides]
        key = (tensors[0].device, *kinds, *steps, constants)
        variant = self._variants.get(key)
        if variant is not None:
            variant[grid](*tensors, *numbers, *strides, *constants)
            return
        variant = self._jitted[grid](*tensors, *numbers, *strides, *constants, **self._options)
        if isinstance(variant, CompiledKernel):  # the interpreter has none
            self._variants[key] = variant
