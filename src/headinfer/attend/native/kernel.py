"""Partial attention on the CPU by the compiled kernels, and by torch's where they do not serve.

`decode.c` takes few query rows and reads at the speed of memory, `decode_rows.c` some more, and
`decode_tiles.c` does so in 16 bits where the processor has a matrix unit; `prefill.c` takes many
rows and multiplies matrices.
None knows masks: the causal square of a chunk's own tokens goes to torch, and padding is left out
by looking at the tokens behind it alone.
"""

import ctypes
import functools

import torch

from headinfer.attend.cpu import CpuKernel
from headinfer.attend.native.build import ELEMENTS, compile_kernel
from headinfer.attend.native.job import MIN_SPLIT_TOKENS, Jobs, job_library
from headinfer.attend.partial import Kernel, Partial, empty_partial, stack_rows
from headinfer.attend.split import even_splits, stealable_splits

MAX_DECODE_ROWS = 16
"""Query rows up to which reading keys and values takes longer than computing, on a matrix unit."""

_MAX_ROWS_AT_ONCE = 8
"""Query rows of `decode.c`, which fit the registers of any processor."""

_DECODE_DIM_MULTIPLE = 16
_PREFILL_DIM_MULTIPLE = 32
"""A head_dim must be one of: whole vectors of the widest processor, and pairs of them."""

_MIN_SPLIT_ROWS = 96
_ALIGNMENT_BYTES = 64

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


@functools.cache
def decode_library(dtype: torch.dtype, head_dim: int, rows: int) -> ctypes.CDLL | None:
    """Return a kernel for a decode step compiled for one shape; None where it cannot be had.

    Args:
        dtype: of keys and values.
        head_dim: elements of one key, and of one value.
        rows: query rows of one KV head.
    """
    if dtype not in ELEMENTS or head_dim % _DECODE_DIM_MULTIPLE or rows > MAX_DECODE_ROWS:
        return None
    library = None
    # The unit knows bfloat16: float16 is taken apart for it, which fewer rows do not repay.
    on_tiles = dtype is torch.bfloat16 or (dtype is torch.float16 and rows > _MAX_ROWS_AT_ONCE)
    if on_tiles and head_dim % _PREFILL_DIM_MULTIPLE == 0:
        library = compile_kernel("decode_tiles.c", dtype, HEAD_DIM=head_dim, ROWS=rows)
        if library is not None and not library.prepare():
            library = None
    if library is None:
        # Pairs of bfloat16 may be worth packing for fewer rows, which the processor decides.
        if rows > _MAX_ROWS_AT_ONCE or dtype is torch.bfloat16:
            library = compile_kernel("decode_rows.c", dtype, HEAD_DIM=head_dim, ROWS=rows)
        if rows <= _MAX_ROWS_AT_ONCE and (library is None or library.fewest_rows() > rows):
            library = compile_kernel("decode.c", dtype, HEAD_DIM=head_dim, ROWS=rows)
    if library is not None:
        library.attend_heads.argtypes = [
            *(_POINTER, _POINTER, _POINTER),  # query, keys, values
            *(_NUMBER, _NUMBER, _NUMBER, _NUMBER, _NUMBER),  # strides, count, heads, splits
            *(ctypes.c_float, _POINTER, _POINTER, _POINTER),  # scale, parts, out, lse
            ctypes.c_int,  # threads
        ]
        library.attend_heads.restype = None
    return library


@functools.cache
def prefill_library(dtype: torch.dtype, head_dim: int) -> ctypes.CDLL | None:
    """Return `prefill.c` compiled for one shape; None where it cannot be had.

    Args:
        dtype: of queries, keys and values.
        head_dim: elements of one key, and of one value.
    """
    if dtype not in ELEMENTS or head_dim % _PREFILL_DIM_MULTIPLE:
        return None
    library = compile_kernel("prefill.c", dtype, HEAD_DIM=head_dim)
    if library is not None and not library.prepare():
        library = compile_kernel("prefill.c", dtype, HEAD_DIM=head_dim, WITHOUT_TILES=1)
    if library is not None:
        library.workspace_bytes.restype = _NUMBER
        library.attend_heads.argtypes = [
            *(_POINTER, _POINTER, _POINTER),  # query, keys, values
            *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # strides, rows, count
            *(_NUMBER, _NUMBER, ctypes.c_float),  # heads, splits, scale
            *(_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_int),  # results, scratch, threads
        ]
        library.attend_heads.restype = None
    return library


class NativeKernel(Kernel):
    """Tiles by the compiled kernels; all else by torch's fused one.

    Results are float32 whatever the input, so that merging rounds once. Uses as many threads as
    torch is set to.
    """

    name = "native attention (CPU)"

    def __init__(self) -> None:
        self._other = CpuKernel()

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend; see `Kernel.attend`."""
        batch, _, group, q_len, head_dim = query.shape
        rows, kv_len = group * q_len, keys.shape[2]
        spans = _visible_spans(mask, batch, kv_len)
        # The kernels read tokens of one dtype that follow each other without a gap.
        readable = all(
            part.dtype == query.dtype and part.stride()[2:] == (head_dim, 1)
            for part in (keys, values)
        )
        square = causal and q_len > 1
        library = None
        attend_row = _decode_row
        if rows and readable and spans is not None and not square:
            library = decode_library(query.dtype, head_dim, rows)
            if library is None and rows > _MAX_ROWS_AT_ONCE:  # many of them
                library, attend_row = prefill_library(query.dtype, head_dim), _prefill_row
        if library is None or spans is None:
            return self._other.attend(query, keys, values, scale=scale, causal=causal, mask=mask)
        return stack_rows(
            [
                attend_row(library, query[row], keys[row, :, span], values[row, :, span], scale)
                if span.stop > span.start
                else _nothing(query[row : row + 1])
                for row, span in enumerate(spans)
            ]
        )

    def jobs(self, query: torch.Tensor, answer: Partial, *, scale: float) -> Jobs | None:
        """Return what makes host functions of this attention that need no Python.

        Args:
            query: `[batch, kv_heads, group, q_len, key_dim]`, contiguous; read when a job runs.
            answer: the partial that a job writes, contiguous, in float32.
            scale: factor of the scores.

        Returns:
            None where only `attend` serves.
        """
        rows, head_dim = query.shape[2] * query.shape[3], query.shape[4]
        if not rows or answer.out.shape != query.shape:
            return None
        attend = decode_library(query.dtype, head_dim, rows)
        library = job_library(query.dtype) if attend is not None else None
        if attend is None or library is None:
            return None
        return Jobs(attend, library, query, answer, scale)


def _visible_spans(mask: torch.Tensor | None, batch: int, kv_len: int) -> list[slice] | None:
    """Return the tokens each row of the batch sees, where every query sees the same stretch."""
    if mask is None:
        return [slice(0, kv_len)] * batch
    if mask.shape[1] > 1:
        return None
    spans = []
    for seen in mask[:, 0].expand(batch, kv_len):
        (indices,) = seen.nonzero(as_tuple=True)
        start, stop = (int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, 0)
        if stop - start != len(indices):
            return None
        spans.append(slice(start, stop))
    return spans


def _nothing(query: torch.Tensor) -> Partial:
    partial = empty_partial(query.float(), query.shape[-1])
    return Partial(partial.out[0], partial.lse[0])


def _decode_row(
    library: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> Partial:
    """Attend one row of the batch: `[kv_heads, group, q_len, dim]` to `[kv_heads, kv_len, dim]`."""
    kv_heads, kv_len = query.shape[0], keys.shape[1]
    threads = torch.get_num_threads()
    splits = stealable_splits(threads, kv_heads, kv_len // MIN_SPLIT_TOKENS)
    rows = query.float().contiguous()
    out, lse = torch.empty_like(rows), rows.new_empty(rows.shape[:-1])
    parts = rows.new_empty(splits * (out.numel() + lse.numel()) if splits > 1 else 0)
    library.attend_heads(
        rows.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        kv_len,
        kv_heads,
        splits,
        scale,
        parts.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    return Partial(out, lse)


def _prefill_row(
    library: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> Partial:
    """Attend one row of the batch: `[kv_heads, group, q_len, dim]` to `[kv_heads, kv_len, dim]`."""
    kv_heads, group, q_len, _ = query.shape
    rows, threads = query.contiguous(), torch.get_num_threads()
    out = rows.new_empty(rows.shape, dtype=torch.float32)
    lse, highest = out.new_empty(2, kv_heads, group, q_len)
    scratch_bytes = threads * library.workspace_bytes() + _ALIGNMENT_BYTES
    scratch = rows.new_empty(scratch_bytes, dtype=torch.uint8)
    library.attend_heads(
        rows.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride(0),
        values.stride(0),
        group * q_len,
        keys.shape[1],
        kv_heads,
        even_splits(threads, kv_heads, group * q_len // _MIN_SPLIT_ROWS),
        scale,
        out.data_ptr(),
        lse.data_ptr(),
        highest.data_ptr(),
        -(-scratch.data_ptr() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES,
        threads,
    )
    return Partial(out, lse)
