"""What is timed to learn the rates of memory, link and matrix products.

A rate is the best of several ways of doing the same: a bound that a run could beat would be none.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from headinfer.device.base import Device
from headinfer.probe.timing import Operation

_LEAST_BATCH_BYTES = 16 * 2**20
"""Small copies are enqueued until they add up to so much. What counts is the rate of a full queue,
not the time of waiting for one copy."""

_LINK_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
"""The link's shares of the bytes that CPU and link read at once. With one of them both finish about
together, on any machine; with any other the faster of the two waits."""

_ARRIVED_BYTES = 64 * 2**20
"""Device memory that such copies go to, again and again."""

_SHARED_BUFFERS = 4
"""Buffers whose bytes are read so; beginning and end then count for little."""


def readers(device: torch.device, elements: int) -> dict[str, Operation]:
    """Return operations bound by the memory of a device.

    Each of them is slow on some machine: a plain `torch.sum` reaches a third of the memory's rate.

    Args:
        device: whose memory.
        elements: float32 elements of each buffer.
    """
    one, other, matrix, vector = _buffers(device, elements)
    size = float(one.nbytes)
    return {
        "torch.dot": (lambda: torch.dot(one, other), 2 * size),
        "torch.mv": (lambda: torch.mv(matrix.T, vector), float(matrix.nbytes)),
        "torch.amax": (lambda: torch.amax(one), size),
        "torch.linalg.vector_norm": (lambda: torch.linalg.vector_norm(one), size),
    } | _copy(one, other)


def _buffers(device: torch.device, elements: int) -> tuple[torch.Tensor, ...]:
    """Return two buffers to read, the first also as a matrix, and a vector with its rows."""
    one, other = (torch.ones(elements, device=device) for _ in range(2))
    width = min(4096, elements)
    matrix = one[: elements // width * width].view(-1, width)
    return one, other, matrix, torch.ones(matrix.shape[0], device=device)


def copies(device: torch.device, elements: int) -> dict[str, Operation]:
    """Return a copy within one memory; bytes read and bytes written count.

    Args:
        device: whose memory.
        elements: float32 elements of each buffer.
    """
    return _copy(*(torch.ones(elements, device=device) for _ in range(2)))


def _copy(source: torch.Tensor, target: torch.Tensor) -> dict[str, Operation]:
    return {"copy, reads and writes": (lambda: target.copy_(source), 2.0 * source.nbytes)}


def matmuls(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> dict[str, Operation]:
    """Return square matrix products.

    Args:
        device: where.
        dtype: of the matrices.
        sizes: their rows and columns.
    """
    operations: dict[str, Operation] = {}
    for size in sizes:
        # Drawn at random: some processors are faster on constants.
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, device=device, dtype=dtype)
        operations[f"{size} x {size}"] = (_product(left, right, out), 2.0 * size**3)
    return operations


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor
) -> Callable[[], torch.Tensor]:
    return lambda: torch.matmul(left, right.T, out=out)


def link(
    devices: Sequence[Device], num_bytes: int, *, to_device: bool = False, to_host: bool = False
) -> dict[str, Operation]:
    """Return copies between pinned host memory and devices, as the engine makes them.

    Args:
        devices: whose copy streams are used, all at once; the operation is done when they are.
        num_bytes: of one copy.
        to_device: whether to copy into the device.
        to_host: whether to copy out of it; with both, the directions run at once.
    """
    count = -(-_LEAST_BATCH_BYTES // num_bytes)
    pairs = []
    for device in devices:
        if to_device:
            pairs.append((device.copy_in, device.device_empty, device.host_empty))
        if to_host:
            pairs.append((device.copy_out, device.host_empty, device.device_empty))
    queues = [
        (stream, target(count * num_bytes), source(count * num_bytes))
        for stream, target, source in pairs
    ]

    def run() -> None:
        for start in range(0, count * num_bytes, num_bytes):
            piece = slice(start, start + num_bytes)
            for stream, target, source in queues:
                stream.copy(target[piece], source[piece])

    return {"pinned copy": (run, float(len(queues) * count * num_bytes))}


def shared(devices: Sequence[Device], elements: int) -> dict[str, Operation]:
    """Return reads of host memory by the CPU while links copy from it; bytes of both count.

    Args:
        devices: whose links are used, all at once; the operation is done when they are.
        elements: float32 elements of each buffer.
    """
    one, other, matrix, vector = _buffers(torch.device("cpu"), elements)
    queues = []
    for device in devices:
        pinned = device.host_empty(one.nbytes)
        pinned.fill_(1)
        queues.append((device.copy_in, pinned, device.device_empty(_ARRIVED_BYTES)))

    def dot(rest: slice) -> object:
        return torch.dot(one[rest], other[rest])

    def mv(rest: slice) -> object:
        rows = slice(rest.start, rest.stop // matrix.shape[1])
        return torch.mv(matrix[rows].T, vector[rows])

    operations: dict[str, Operation] = {}
    for name, read, buffers in (("torch.dot", dot, 2), ("torch.mv", mv, 1)):
        for link_share in _LINK_SHARES:
            link_bytes = int(link_share * _SHARED_BUFFERS * one.nbytes)
            reads = int((1 - link_share) * _SHARED_BUFFERS * elements / buffers)

            def run(
                link_bytes: int = link_bytes,
                reads: int = reads,
                read: Callable[[slice], object] = read,
            ) -> None:
                for piece in _pieces(link_bytes // len(queues), one.nbytes, _ARRIVED_BYTES):
                    for stream, pinned, arrived in queues:
                        stream.copy(arrived[: piece.stop - piece.start], pinned[piece])
                for piece in _pieces(reads, elements, elements):
                    read(piece)

            amount = float(link_bytes + reads * buffers * one.itemsize)
            operations[f"{name}, {link_share:.0%} by the link"] = (run, amount)
    return operations


def _pieces(amount: int, size: int, most: int) -> Iterator[slice]:
    """Yield slices of a buffer of some size, of at most `most`, that add up to an amount.

    They follow each other, and begin again where the buffer ends.
    """
    start = 0
    while amount > 0:
        count = min(amount, size - start, most)
        yield slice(start, start + count)
        amount, start = amount - count, (start + count) % size
