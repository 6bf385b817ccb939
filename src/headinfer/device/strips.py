"""A copy between tensors as copies of equally spaced stretches of memory, as few as may be.

A tile's heads lie apart in host memory, each contiguous. torch copies them one by one; a copy
engine takes all of them as one strip.

Measured beside an H100: starting a copy takes the host 6 us.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

MAX_PITCH_BYTES = 2**31 - 1
"""CUDA's limit (`CU_DEVICE_ATTRIBUTE_MAX_PITCH`)."""


class Strip(NamedTuple):
    """A strip: stretches of memory at equal distances, and where they are to go.

    Attributes:
        destination: address of the first one's destination.
        source: its own address.
        width_bytes: of each.
        height: their number.
        destination_pitch_bytes: from the start of one destination to the next.
        source_pitch_bytes: from the start of one to the next.
    """

    destination: int
    source: int
    width_bytes: int
    height: int
    destination_pitch_bytes: int
    source_pitch_bytes: int


def strips(destination: torch.Tensor, source: torch.Tensor) -> Iterator[Strip]:
    """Yield the strips of a copy between tensors of equal shape and dtype."""
    size = destination.dtype.itemsize
    to, start = destination.data_ptr(), source.data_ptr()
    if destination.is_contiguous() and source.is_contiguous():
        if num_bytes := destination.nbytes:
            yield Strip(to, start, num_bytes, 1, num_bytes, num_bytes)
        return
    axes = [  # of more than one element: their size, and the bytes from one to the next
        (count, step * size, other * size)
        for count, step, other in zip(
            destination.shape, destination.stride(), source.stride(), strict=True
        )
        if count != 1
    ]
    if any(not count for count, _, _ in axes):
        return
    width = size
    while axes and axes[-1][1:] == (width, width):
        width *= axes.pop()[0]
    height, pitch, other_pitch = 1, width, width
    if axes and all(width <= step <= MAX_PITCH_BYTES for step in axes[-1][1:]):
        height, pitch, other_pitch = axes.pop()
        while axes and axes[-1][1:] == (height * pitch, height * other_pitch):
            height *= axes.pop()[0]
    offsets = [(0, 0)]
    for count, step, other in axes:
        offsets = [
            (first + index * step, second + index * other)
            for first, second in offsets
            for index in range(count)
        ]
    for first, second in offsets:
        yield Strip(to + first, start + second, width, height, pitch, other_pitch)


def token_strips(
    destination: Sequence[torch.Tensor],
    at: int,
    source: Sequence[torch.Tensor],
    first: int,
    tokens: int,
) -> list[Strip]:
    """Return the strips of `Stream.copy_tokens`, found by arithmetic alone: a view takes longer."""
    found: list[Strip] = []
    for to, start in zip(destination, source, strict=True):
        batch, heads, capacity, dim = to.shape
        row_bytes = dim * to.itemsize
        pitch, other_pitch = capacity * row_bytes, start.shape[2] * row_bytes
        ends = to.data_ptr() + at * row_bytes, start.data_ptr() + first * row_bytes
        strip = Strip(*ends, tokens * row_bytes, batch * heads, pitch, other_pitch)
        if found and strip == found[-1]._replace(
            destination=found[-1].destination + found[-1].height * pitch,
            source=found[-1].source + found[-1].height * other_pitch,
        ):
            found[-1] = found[-1]._replace(height=2 * strip.height)
        else:
            found.append(strip)
    if max([max(strip[-2:]) for strip in found]) <= MAX_PITCH_BYTES:
        return found
    return [head for strip in found for head in _in_reach(strip)]


def _in_reach(strip: Strip) -> Iterator[Strip]:
    """Yield a strip, or its stretches one by one where they lie too far apart for a copy engine."""
    if max(strip[-2:]) <= MAX_PITCH_BYTES:
        yield strip
        return
    for index in range(strip.height):
        yield strip._replace(
            destination=strip.destination + index * strip.destination_pitch_bytes,
            source=strip.source + index * strip.source_pitch_bytes,
            height=1,
        )


def contiguous_pieces(
    destination: torch.Tensor, source: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views of two tensors of equal shape, in pairs that are contiguous, as few as may be."""
    if destination.is_contiguous() and source.is_contiguous():
        yield destination, source
        return
    for pair in zip(destination.unbind(0), source.unbind(0), strict=True):
        yield from contiguous_pieces(*pair)
