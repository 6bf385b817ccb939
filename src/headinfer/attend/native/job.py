"""Jobs: attention that is prepared in Python, and runs without it (`job.c`).

A thread of the driver's that ran Python would take Python's lock for each small call. It would wait
each time for the thread that launches kernels, and delay that thread as often.
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Protocol

import torch

from headinfer.attend.native.splits import stealable_splits
from headinfer.attend.native.workers import Workers, shared_workers
from headinfer.attend.partial import Partial
from headinfer.device.host_calls import NativeFunction
from headinfer.kv.extent import Tile
from headinfer.native.build import compile_kernel
from headinfer.plan.format import Format

MIN_SPLIT_TOKENS = 512
"""Tokens that are worth a part of their own."""

_FREE_THREADS_FROM = 5
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_compile = functools.partial(compile_kernel, __package__)


class _Span(ctypes.Structure):
    """A `struct span` of `job.c`."""

    _fields_ = (
        *((name, _POINTER) for name in ("attend", "keys", "values")),
        *((name, _NUMBER) for name in ("key_stride", "value_stride")),
        *((name, _NUMBER) for name in ("first", "tokens", "splits")),
    )


class _Block(ctypes.Structure):
    """A `struct job` of `job.c`."""

    _fields_ = (
        *((name, _POINTER) for name in ("workers", "query", "out", "lse")),
        *((name, _POINTER) for name in ("scratch", "spans")),
        *((name, _NUMBER) for name in ("splits", "heads", "rows", "dim")),
        *((name, ctypes.c_double) for name in ("start_s", "end_s")),
        ("next", _NUMBER),
        ("scale", ctypes.c_float),
        ("finished", ctypes.c_int32),
    )


@functools.cache
def job_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return `job.c` compiled for one dtype; None where it cannot be had.

    Its clock is that of `time.perf_counter` on Linux alone.
    """
    library = _compile("job.c", dtype) if sys.platform == "linux" else None
    if library is not None:
        library.run_job.argtypes = [_POINTER]
        library.run_job.restype = None
        library.start_workers.argtypes = [_NUMBER]
        library.start_workers.restype = _POINTER
        library.stop_workers.argtypes = [_POINTER]
        library.stop_workers.restype = None
    return library


def row_size(form: Format, dim: int) -> int:
    """Return the elements of a token as it is stored, or the bytes of a page."""
    return dim if form is Format.DENSE else form.row_bytes(dim, 0)


class Attending(Protocol):
    """A function that returns the library for tokens of a form; None where it cannot be had."""

    def __call__(self, form: Format) -> ctypes.CDLL | None:
        """Return it; its `attend_stretch` attends some tokens of one head."""


class Job(NativeFunction):
    """An attention to be enqueued once; made by `Jobs.make`.

    It keeps what it attends. Whoever enqueues it keeps it until it ran, and releases it then.
    """

    __slots__ = ("_free", "_kept", "_spans", "block")

    def __init__(self, library: ctypes.CDLL, block: _Block, free: "list[Job]") -> None:
        super().__init__(library.run_job, ctypes.addressof(block))
        self.block = block
        self._free = free
        self._spans = (_Span * 0)()
        self._kept: tuple[object, ...] = ()

    def fill(self, spans: Sequence[tuple[int, ...]], kept: tuple[object, ...]) -> None:
        """Set what is attended: the fields of each `_Span`, and what must be kept meanwhile."""
        if len(spans) > len(self._spans):
            self._spans = (_Span * len(spans))()
            self.block.spans = ctypes.addressof(self._spans)
        for position, span in enumerate(spans):
            self._spans[position] = _Span(*span)
        self.block.finished = 0
        self._kept = kept

    @property
    def finished(self) -> bool:
        """Whether it ran."""
        return bool(self.block.finished)

    @property
    def times(self) -> tuple[float, float]:
        """When it began and ended, by `time.perf_counter`, once it ran."""
        return self.block.start_s, self.block.end_s

    def release(self) -> None:
        """Let go of what was attended, and be used again; only once it ran."""
        self._kept = ()
        self._free.append(self)


class Jobs:
    """A maker of jobs that attend with one query's memory, and answer to one answer's memory.

    Jobs must run one after another, in the order in which they were made: they share their scratch
    memory, too.

    Args:
        attend: gives the library whose `attend_stretch` is compiled for the shape and for
            a form of tokens.
        library: `job_library` of the query's dtype.
        query: `[batch, kv_heads, group, q_len, dim]`, contiguous; read when a job runs.
        answer: of the same shape, contiguous, in float32; written when a job runs.
        scale: factor of the scores.
    """

    def __init__(
        self,
        attend: Attending,
        library: ctypes.CDLL,
        query: torch.Tensor,
        answer: Partial,
        scale: float,
    ) -> None:
        batch, kv_heads, group, q_len, dim = query.shape
        self._library = library
        self._kv_heads, self._dim, self._dtype = kv_heads, dim, query.dtype
        self._addresses: dict[Format, int | None] = {}
        self._heads, self._rows = batch * kv_heads, group * q_len
        self._scratch = torch.empty(0, dtype=torch.float32, device="cpu")
        self._attend = attend
        self._memory = query, answer  # jobs know them by address
        self._free: list[Job] = []
        self._workers: Workers | None = None  # kept from job to job
        self._template = _Block(
            query=query.data_ptr(),
            out=answer.out.data_ptr(),
            lse=answer.lse.data_ptr(),
            heads=self._heads,
            rows=self._rows,
            dim=dim,
            scale=scale,
        )

    def make(self, tiles: Sequence[Tile]) -> Job | None:
        """Return a job that attends tiles of all heads, which must stay as they are until it ran.

        The driver's thread is helped by others, so that there are as many as torch is set to in
        this one. Where they are more than a few, a core is left to this thread.

        Returns:
            None where keys or values lie in memory otherwise than a store's.
        """
        threads = torch.get_num_threads()
        if threads >= _FREE_THREADS_FROM:
            threads -= 1
        spans, parts = [], 0
        for tile in tiles:
            (keys, values), first, tokens = tile.whole, tile.first, tile.tokens
            form = tile.format
            key_stride, value_stride = (self._head_stride(part, form) for part in tile.whole)
            attend = self._address(form)
            if key_stride is None or value_stride is None or attend is None:
                return None
            if not tokens:
                continue
            splits = stealable_splits(threads, self._heads, tokens // MIN_SPLIT_TOKENS)
            where = attend, keys.data_ptr(), values.data_ptr(), key_stride, value_stride
            spans.append((*where, first, tokens, splits))
            parts += splits
        floats = self._heads * (self._rows * (self._dim + parts * (self._dim + 1)) + 1)
        if self._scratch.numel() < floats:
            self._scratch = self._scratch.new_empty(floats)  # jobs pending keep the old
        job = self._free.pop() if self._free else self._new()
        workers = self._workers = shared_workers(self._library, threads - 1)
        job.fill(spans, (self, self._scratch, tiles, workers))
        job.block.scratch = self._scratch.data_ptr()
        job.block.splits = parts
        job.block.workers = workers.address
        return job

    def _address(self, form: Format) -> int | None:
        """Return where the function is that attends tokens of a form; None where there is none."""
        if form not in self._addresses:
            library = self._attend(form)
            self._addresses[form] = (
                None if library is None else ctypes.cast(library.attend_stretch, _POINTER).value
            )
        return self._addresses[form]

    def _head_stride(self, part: torch.Tensor, form: Format) -> int | None:
        """Return the bytes from head to head; None where rows of the batch are not like heads.

        The kernels read tokens of one dtype, or pages, that follow each other without a gap.
        """
        row, head, token, element = part.stride()
        if part.dtype is not (self._dtype if form is Format.DENSE else torch.uint8):
            return None
        if (token, element) != (row_size(form, self._dim), 1):
            return None
        if row != head * self._kv_heads and self._heads != self._kv_heads:
            return None
        return head * part.itemsize

    def _new(self) -> Job:
        return Job(self._library, _Block.from_buffer_copy(self._template), self._free)
