"""Tensors in one file of the safetensors format, laid out before their bytes are there.

The format is a length, a header in JSON and the bytes of all tensors without a gap. The library's
own functions take a copy of all tensors or map the file. Here one buffer is filled, checked and
written as it is, and is read in one piece.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 64
"""The header is filled up with blanks, so that tensors can be viewed where they lie."""


class Spec(NamedTuple):
    """A tensor's dtype and shape.

    Attributes:
        dtype: one that safetensors has.
        shape: sizes of all axes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Layout:
    """A layout of named tensors in one file.

    Args:
        specs: what each tensor is. Large elements come first, so that all are aligned.

    Attributes:
        specs: of the tensors, in their order in the file.
        num_bytes: of the file.
    """

    def __init__(self, specs: Mapping[str, Spec]) -> None:
        order = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
        self.specs = {name: specs[name] for name in order}
        self._offsets: dict[str, int] = {}
        end, header = 0, {}
        for name, spec in self.specs.items():
            self._offsets[name], end = end, end + spec.num_bytes
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [self._offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)
        self._header = len(text).to_bytes(_LENGTH_BYTES, "little") + text
        self.num_bytes = len(self._header) + end

    def begin(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Write the header to a buffer, and return the tensors behind it, to be filled.

        Args:
            buffer: at least `num_bytes` of uint8, on the CPU.
        """
        header = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        buffer[: len(header)].copy_(header)
        return self.views(buffer)

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors as views of a buffer that holds a file of this layout."""
        start, views = len(self._header), {}
        for name, spec in self.specs.items():
            first = start + self._offsets[name]
            part = buffer[first : first + spec.num_bytes]
            views[name] = part.view(spec.dtype).view(spec.shape)
        return views


def tensors_in(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that was read into memory, as views of it.

    Args:
        buffer: all of the file, uint8 on the CPU.

    Raises:
        ValueError: it is no file of safetensors that a `Layout` wrote.
    """
    length = int.from_bytes(buffer[:_LENGTH_BYTES].numpy().tobytes(), "little")
    text = buffer[_LENGTH_BYTES : _LENGTH_BYTES + length].numpy().tobytes()
    if len(text) != length:
        raise ValueError("its header is cut off")
    header: dict[str, Any] = json.loads(text)
    try:
        specs = {
            name: Spec(_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            for name, entry in header.items()
        }
    except (KeyError, TypeError) as error:
        raise ValueError("its header is none of safetensors") from error
    layout = Layout(specs)
    if layout.num_bytes != buffer.numel():
        raise ValueError("its header tells of other bytes than it has")
    return layout.views(buffer)
