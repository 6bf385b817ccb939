"""What we call in CUDA's driver itself: torch has no binding for it, or one that is much slower.

`ctypes` releases Python's lock during a call.
"""

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable

import torch

from headinfer.device.strips import Strip

_SUCCESS = 0
_WRONG_CONTEXT = 201, 400  # there is none, or the stream is of another
_UNIFIED = 4  # CU_MEMORYTYPE_UNIFIED: the address tells on which side it is

_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_VALUE = (_POINTER, _POINTER, ctypes.c_uint64, ctypes.c_uint)


class _Copy(ctypes.Structure):
    """A `CUDA_MEMCPY2D` of the driver's."""

    _fields_ = (
        ("src_x", _SIZE),
        ("src_y", _SIZE),
        ("src_memory_type", ctypes.c_int),
        ("src_host", _POINTER),
        ("src_device", _POINTER),
        ("src_array", _POINTER),
        ("src_pitch", _SIZE),
        ("dst_x", _SIZE),
        ("dst_y", _SIZE),
        ("dst_memory_type", ctypes.c_int),
        ("dst_host", _POINTER),
        ("dst_device", _POINTER),
        ("dst_array", _POINTER),
        ("dst_pitch", _SIZE),
        ("width", _SIZE),
        ("height", _SIZE),
    )


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the driver's library, which torch has loaded already.

    Raises:
        OSError: there is none.
    """
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    for function, arguments in (
        (library.cuLaunchHostFunc, (_POINTER, _POINTER, _POINTER)),
        (library.cuMemcpyAsync, (_POINTER, _POINTER, _SIZE, _POINTER)),
        (library.cuMemcpy2DAsync_v2, (ctypes.POINTER(_Copy), _POINTER)),
        (library.cuMemHostGetDevicePointer_v2, (ctypes.POINTER(_POINTER), _POINTER, ctypes.c_uint)),
        (library.cuStreamWriteValue64_v2, _VALUE),
        (library.cuStreamWaitValue64_v2, _VALUE),
    ):
        function.argtypes = arguments
        function.restype = ctypes.c_int
    return library


def launch_host_function(
    stream: torch.cuda.Stream, entry: Callable[[int], None], argument: int
) -> None:
    """Have a function of ctypes' called once all work so far on a stream is done.

    Raises:
        RuntimeError: the driver refuses.
    """
    _checked("cuLaunchHostFunc", stream, stream.cuda_stream, entry, argument)


def write_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Have 64 bits of mapped memory written once all work so far on a stream is done.

    Raises:
        RuntimeError: the driver refuses.
    """
    _checked("cuStreamWriteValue64_v2", stream, stream.cuda_stream, address, value, 0)


def wait_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Hold later work on a stream until 64 bits of mapped memory have a value.

    Raises:
        RuntimeError: the driver refuses.
    """
    _checked("cuStreamWaitValue64_v2", stream, stream.cuda_stream, address, value, _EQUAL)


def mapped_address(device: torch.device, host_address: int) -> int:
    """Return where a device's kernels find page-locked host memory.

    Raises:
        RuntimeError: the driver refuses.
    """
    address = _POINTER()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        arguments = ctypes.byref(address), host_address, 0
        _checked("cuMemHostGetDevicePointer_v2", stream, *arguments)
    assert address.value is not None
    return address.value


def copy(stream: torch.cuda.Stream, strips: Iterable[Strip]) -> None:
    """Enqueue copies.

    The host's memory must be page-locked, or the caller waits. torch's allocator learns nothing of
    the stream. The default one is that of whichever device is current.

    Raises:
        RuntimeError: the driver refuses.
    """
    if stream.cuda_stream == 0 and torch.cuda.current_device() != stream.device.index:
        with torch.cuda.device(stream.device):
            copy(stream, strips)
        return
    for strip in strips:
        if strip.height == 1:
            arguments = strip.destination, strip.source, strip.width_bytes
            _checked("cuMemcpyAsync", stream, *arguments, stream.cuda_stream)
        else:
            copy_2d = ctypes.byref(_described(strip))
            _checked("cuMemcpy2DAsync_v2", stream, copy_2d, stream.cuda_stream)


def _described(strip: Strip) -> _Copy:
    return _Copy(
        src_memory_type=_UNIFIED,
        src_device=strip.source,
        src_pitch=strip.source_pitch_bytes,
        dst_memory_type=_UNIFIED,
        dst_device=strip.destination,
        dst_pitch=strip.destination_pitch_bytes,
        width=strip.width_bytes,
        height=strip.height,
    )


def _checked(name: str, stream: torch.cuda.Stream, *arguments: object) -> None:
    """Call a function of the driver, with the stream's device made this thread's if need be."""
    function = getattr(driver(), name)
    status = function(*arguments)
    if status in _WRONG_CONTEXT:  # of a thread that did nothing on the device yet, or on another
        with torch.cuda.device(stream.device):
            torch.cuda.current_stream().query()
            status = function(*arguments)
    if status != _SUCCESS:
        raise RuntimeError(f"{name} failed with CUDA error {status}")
