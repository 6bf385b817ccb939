"""Partial attention on the CPU by the compiled kernels.

`decode.c` takes few query rows and reads at the speed of memory, `decode_rows.c` those of some new
tokens. Where the processor has a matrix unit, `decode_tiles.c` takes up to 16 rows in 16 bits, and
`decode_groups.c` more of bfloat16. `prefill.c` takes many rows and multiplies matrices.

No kernel knows masks. The causal square of a chunk's own tokens is torch's. Padding is left out by
looking at the tokens behind it alone.
"""

import ctypes
import functools

import torch

from headinfer.attend.native.job import MIN_SPLIT_TOKENS, Jobs, job_library, row_size
from headinfer.attend.native.splits import even_splits, stealable_splits
from headinfer.attend.partial import Partial
from headinfer.attend.work import Work
from headinfer.eight_bits.layout import EightBitLayout
from headinfer.kv.extent import Tile
from headinfer.native.build import ELEMENTS, compile_kernel
from headinfer.packed.layout import PageLayout, packs
from headinfer.plan.format import Format

MAX_DECODE_ROWS = 256
"""Query rows of a KV head up to which keys and values are read once for all: 16 tokens of a group
of 16."""

_MAX_COMPILED_ROWS = 16
"""Query rows up to which each number has a library. One serves all above it."""

_MAX_ROWS_AT_ONCE = 8
"""Query rows of `decode.c`, which fit the registers of any processor."""

_DECODE_DIM_MULTIPLE = 16
_PREFILL_DIM_MULTIPLE = 32
"""A head_dim must be one of: whole vectors of the widest processor, and pairs of them."""

_MIN_SPLIT_ROWS = 96
_ALIGNMENT_BYTES = 64
_FLOAT_BYTES = 4

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_compile = functools.partial(compile_kernel, __package__)


@functools.cache
def decode_library(
    dtype: torch.dtype, head_dim: int, rows: int, form: Format = Format.DENSE
) -> ctypes.CDLL | None:
    """Return a kernel for a decode step compiled for one shape; None where it cannot be had.

    Args:
        dtype: of keys and values.
        head_dim: elements of one key, and of one value.
        rows: query rows of one KV head.
        form: in which keys and values lie.
    """
    if dtype not in ELEMENTS or head_dim % _DECODE_DIM_MULTIPLE or rows > MAX_DECODE_ROWS:
        return None
    if form is not Format.DENSE and not packs(head_dim):
        return None
    if form is Format.PACKED and dtype is not torch.bfloat16:
        return None
    if _MAX_COMPILED_ROWS < rows < MAX_DECODE_ROWS:
        return decode_library(dtype, head_dim, MAX_DECODE_ROWS, form)
    library, many = None, rows > _MAX_COMPILED_ROWS
    shape = {"HEAD_DIM": head_dim, "ROWS": rows, **_definitions(form, head_dim)}
    # The unit knows bfloat16: float16 is taken apart for it, which few rows do not repay.
    on_tiles = dtype is torch.bfloat16
    on_tiles |= dtype is torch.float16 and not many and rows > _MAX_ROWS_AT_ONCE
    if on_tiles and head_dim % _PREFILL_DIM_MULTIPLE == 0:
        source = "decode_groups.c" if many else "decode_tiles.c"
        library = _compile(source, dtype, **shape)
        if library is not None and not library.prepare():
            library = None
    if library is None:
        # Pairs of bfloat16 may be worth packing for fewer rows, which the processor decides.
        if rows > _MAX_ROWS_AT_ONCE or dtype is torch.bfloat16:
            library = _compile("decode_rows.c", dtype, **shape)
        if rows <= _MAX_ROWS_AT_ONCE and (library is None or library.fewest_rows() > rows):
            library = _compile("decode.c", dtype, **shape)
    if library is not None:
        library.attend_heads.argtypes = [
            *(_POINTER, _POINTER, _POINTER),  # query, keys, values
            *(_NUMBER, _NUMBER, _NUMBER, _NUMBER),  # strides, first, count
            *(_NUMBER, _NUMBER),  # heads, splits
            *(ctypes.c_float, _POINTER, _POINTER, _POINTER),  # scale, parts, out, lse
            *(_NUMBER, ctypes.c_int),  # rows, threads
        ]
        library.attend_heads.restype = None
        if form is Format.DENSE:
            library.attend_token.argtypes = [_POINTER]
            library.attend_token.restype = None
    return library


def _definitions(form: Format, head_dim: int) -> dict[str, int]:
    """Return what the kernels are told of pages."""
    if form is Format.DENSE:
        return {}
    code = form.code
    layout = PageLayout(head_dim) if code is None else EightBitLayout(code, head_dim)
    return {"PACKED": 1, **layout.definitions}


@functools.cache
def prefill_library(dtype: torch.dtype, head_dim: int) -> ctypes.CDLL | None:
    """Return `prefill.c` compiled for one shape; None where it cannot be had.

    Args:
        dtype: of queries, keys and values.
        head_dim: elements of one key, and of one value.
    """
    if dtype not in ELEMENTS or head_dim % _PREFILL_DIM_MULTIPLE:
        return None
    library = _compile("prefill.c", dtype, HEAD_DIM=head_dim)
    if library is not None and not library.prepare():
        library = _compile("prefill.c", dtype, HEAD_DIM=head_dim, WITHOUT_TILES=1)
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


class NativeKernel:
    """A kernel in C for tiles, under masks that leave each row of the batch a stretch of tokens.

    Tiles that are not dense are pages of uint8, `[batch, heads, pages, page_bytes]`, which few
    rows attend as they are.

    Results are float32 whatever the input, so that merging rounds once. Uses as many threads as
    torch is set to.
    """

    name = "native attention (CPU)"

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work."""
        query, mask = work.query, work.mask
        dtype, group, q_len, dim = query.dtype, *query.shape[2:]
        rows = group * q_len
        if not rows or (work.causal and q_len > 1):
            return False
        if decode_library(dtype, dim, rows) is None and (
            rows <= _MAX_ROWS_AT_ONCE or prefill_library(dtype, dim) is None
        ):
            return False
        for tile in work.tiles:
            keys, values = tile.whole
            form = tile.format
            if form is not Format.DENSE and decode_library(dtype, dim, rows, form) is None:
                return False
            stored = dtype if form is Format.DENSE else torch.uint8
            if keys.dtype is not stored or values.dtype is not stored:
                return False
            layout = row_size(form, dim), 1  # rows follow each other without a gap
            if keys.stride()[2:] != layout or values.stride()[2:] != layout:
                return False
        return mask is None or _visible_spans(mask, query.shape[0]) is not None

    def square(self, _work: Work) -> None:
        """Return None: it is no operator of torch's."""

    def attend(self, work: Work) -> None:
        """Attend; see `Kernel.attend`."""
        query, into, mask, scale = work.query, work.into, work.mask, work.scale
        batch, kv_heads, group, q_len, dim = query.shape
        library = decode_library(query.dtype, dim, group * q_len)
        assert into is not None
        if library is None:
            for tile in work.tiles:
                if tile.tokens:
                    into.add(self._attend_many(work, tile))
            return
        spans = None if mask is None else _visible_spans(mask, batch)
        threads = torch.get_num_threads()
        rows = query.float().contiguous()
        for tile in work.tiles:
            (keys, values), first, count = tile.whole, tile.first, tile.tokens
            if not count:
                continue
            step = keys.itemsize
            of_form = decode_library(query.dtype, dim, group * q_len, tile.format)
            assert of_form is not None
            row, head, _, _ = keys.stride()
            value_row, value_head, _, _ = values.stride()
            first_head = tile.heads.start or 0
            out, lse = torch.empty_like(rows), rows.new_empty(rows.shape[:-1])
            calls, heads = batch, kv_heads
            if spans is None and row == kv_heads * head and value_row == kv_heads * value_head:
                calls, heads = 1, batch * kv_heads  # rows of the batch are as many heads more
            results = heads * group * q_len
            for call in range(calls):
                if spans is not None:
                    start, count = spans[call]
                    first = tile.first + start
                if not count:
                    out[call], lse[call] = 0.0, -torch.inf
                    continue
                splits = stealable_splits(threads, heads, count // MIN_SPLIT_TOKENS)
                parts = rows.new_empty(splits * results * (dim + 1) if splits > 1 else 0)
                at, key_at = call * results, call * row + first_head * head
                value_at = call * value_row + first_head * value_head
                of_form.attend_heads(
                    rows.data_ptr() + at * dim * _FLOAT_BYTES,
                    *(keys.data_ptr() + key_at * step, values.data_ptr() + value_at * step),
                    *(head, value_head, first, count, heads, splits, scale, parts.data_ptr()),
                    out.data_ptr() + at * dim * _FLOAT_BYTES,
                    *(lse.data_ptr() + at * _FLOAT_BYTES, group * q_len, threads),
                )
            into.add(Partial(out, lse))

    def _attend_many(self, work: Work, tile: Tile) -> Partial:
        """Attend many rows to a tile, which multiplies matrices."""
        query, mask, (keys, values) = work.query, work.mask, tile.kv
        batch, kv_heads, group, q_len, dim = query.shape
        library, threads = prefill_library(query.dtype, dim), torch.get_num_threads()
        assert library is not None
        rows, scratch_bytes = query.contiguous(), threads * library.workspace_bytes()
        scratch = rows.new_empty(scratch_bytes + _ALIGNMENT_BYTES, dtype=torch.uint8)
        splits = even_splits(threads, kv_heads, group * q_len // _MIN_SPLIT_ROWS)
        spans = None if mask is None else _visible_spans(mask, batch)
        out = rows.new_empty(query.shape, dtype=torch.float32)
        lse, highest = out.new_empty(2, *out.shape[:-1])
        for row, (start, count) in enumerate(spans or [(0, tile.tokens)] * batch):
            if not count:
                out[row], lse[row] = 0.0, -torch.inf
                continue
            tokens = (part[row, :, start:].data_ptr() for part in (keys, values))
            results = (part[row].data_ptr() for part in (out, lse, highest))
            library.attend_heads(
                *(rows[row].data_ptr(), *tokens, keys.stride(1), values.stride(1)),
                *(group * q_len, count, kv_heads, splits, work.scale, *results),
                -(-scratch.data_ptr() // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES,
                threads,
            )
        return Partial(out, lse)

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
        of_form = functools.partial(decode_library, query.dtype, head_dim, rows)
        return Jobs(of_form, library, query, answer, scale)


def _visible_spans(mask: torch.Tensor, batch: int) -> list[tuple[int, int]] | None:
    """Return first and number of the tokens each row sees; None where that is no one stretch."""
    if mask.shape[1] > 1:
        return None
    spans = []
    for seen in mask[:, 0].expand(batch, -1):
        (indices,) = seen.nonzero(as_tuple=True)
        count = len(indices)
        start = int(indices[0]) if count else 0
        if count and int(indices[-1]) + 1 - start != count:
            return None
        spans.append((start, count))
    return spans
