"""Launching Triton programs at little cost to the host."""

import contextlib
import threading
from typing import Any

import torch
from triton.compiler import CompiledKernel

_UNALIGNED = 15  # bits of an address, or of a stride, that is no multiple of 16
_MAX_INT32 = 2**31 - 1


def power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a number."""
    return 1 << (number - 1).bit_length()


_identifying = threading.Lock()


def identify_triton() -> None:
    """Have Triton find out which Triton it is, as it does once, before its first program.

    It reads all its files for that. A second thread waits for the first, and finds it done.

    Measured beside an H100: that took 0.3 to 0.8 s.
    """
    with contextlib.suppress(ImportError), _identifying:
        from triton.runtime.cache import triton_key  # where it is, differs between versions

        triton_key()


class Program:
    """A jitted program that finds its compiled variant once, not at each launch.

    Triton looks the variant up by every argument. A decode step makes 64 launches and more.

    Measured beside an H100: a lookup took 60 us of the host's time, six times what the launch
    takes.

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
        """Enqueue the program on the current stream of the tensors' device.

        All in one frame: a decode step calls it once for each tile.
        """
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(grid, tensors, numbers, strides, constants)
            return
        # What Triton compiles for: types, and of pointers and strides what it specialises on.
        key: list[object] = [device, constants]
        for tensor in tensors:
            key += (tensor.dtype, tensor.data_ptr() & _UNALIGNED == 0)
        for stride in strides:
            aligned = stride & _UNALIGNED == 0
            key.append(-1 if stride == 1 else aligned + 2 * (stride > _MAX_INT32))
        variant = self._variants.get(tuple(key))
        if variant is not None:
            variant[grid](*tensors, *numbers, *strides, *constants)
            return
        identify_triton()
        variant = self._jitted[grid](*tensors, *numbers, *strides, *constants, **self._options)
        if isinstance(variant, CompiledKernel):  # the interpreter has none
            self._variants[tuple(key)] = variant
