"""Packing and unpacking of tokens that begin within a page, and by the CPU in its own memory."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from headinfer.attend.work import Work, tile_in_hand
from headinfer.device.base import Device
from headinfer.eight_bits.codec import CpuEightBits
from headinfer.eight_bits.layout import Code
from headinfer.engine.codecs import codec_of
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.raw_pages import begun_slots
from headinfer.kv.extent import Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.packed.codec import Codec, CpuCodec
from headinfer.plan.format import Format

_CPU = torch.device("cpu")

_ALONE: dict[Code | None, Codec] = {
    None: CpuCodec(threads=1),
    **{code: CpuEightBits(code, alone=True) for code in Code},
}
"""Unpack in the background of a session that is saved: threads would wait for each other."""

_UNPACKED_TOKENS = 4096
"""Tokens that the CPU unpacks at a time, where no compiled kernel attends them as they are."""


def packed_in_two(before: KV, new: KV, pages: KV) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Return what is to be packed into which pages: the first page where others were, and the rest.

    Args:
        before: tokens of the first page that are packed anew; fewer than fill it.
        new: tokens that follow them.
        pages: as many as they take.
    """
    split = Format.PACKED.row_tokens - before.tokens if before.tokens else 0
    found = []
    for old, values, page in zip(before, new, pages, strict=True):
        if split:
            found.append((torch.cat([old, values[:, :, :split]], 2), page[:, :, :1]))
        if values.shape[2] > split:
            found.append((values[:, :, split:], page[:, :, bool(split) :]))
    return found


def full_and_begun(
    ledger: Ledger, tile: Tile, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return what was packed into pages that stay, and into one that the next tokens go on in.

    Args:
        ledger: of the layer.
        tile: the tokens.
        parts: what `packed_in_two` gave of them.
    """
    goes_on = ledger.wanting_tokens(tile.start + tile.tokens) > 0
    full, begun = [], []
    for values, pages in parts:
        left = values.shape[2] % tile.format.row_tokens if goes_on else 0
        split = values.shape[2] - left
        rows = tile.format.rows(split)
        if split:
            full.append((values[:, :, :split], pages[:, :, :rows]))
        if left:
            begun.append((values[:, :, split:], pages[:, :, rows:]))
    return full, begun


def unpack_from(codec: Codec, pages: torch.Tensor, first: int, values: torch.Tensor) -> None:
    """Unpack tokens that may begin within a page.

    Args:
        codec: unpacks.
        pages: those that have the tokens.
        first: the first token's index; its page is the first.
        values: `[batch, heads, tokens, dim]`; written.
    """
    row_tokens, tokens = Format.PACKED.row_tokens, values.shape[2]
    lead = first % row_tokens
    split = min(row_tokens - lead, tokens) if lead else 0
    if split:
        shape = (*values.shape[:2], lead + split, values.shape[3])
        page = values.new_empty(shape)
        codec.unpack(pages[:, :, :1], page)
        values[:, :, :split].copy_(page[:, :, lead:])
    if tokens > split:
        codec.unpack(pages[:, :, bool(split) :], values[:, :, split:])


def unpack_here(tile: Tile, place: KV) -> None:
    """Unpack tokens of host memory into other memory of the CPU, in this thread alone."""
    for pages, values in zip(tile.kv, place, strict=True):
        unpack_from(_ALONE[tile.format.code], pages, tile.first, values)


def unpacked_here(tile: Tile, part: str, like: torch.Tensor) -> torch.Tensor:
    """Return keys or values of packed tokens in memory of the CPU, unpacked into more of it.

    Args:
        tile: the tokens.
        part: "keys" or "values".
        like: of the shape and dtype that they are to have.
    """
    values = torch.empty(like.shape, dtype=like.dtype, device=_CPU)
    unpack_from(codec_of(tile.format, _CPU), getattr(tile.kv, part), tile.first, values)
    return values


def pack_here(device: Device, ledger: Ledger, tile: Tile, new: KV) -> None:
    """Pack tokens of the CPU's memory into a tile of host memory, which is at rest.

    Args:
        device: gives memory for pages that overflow.
        ledger: of the layer.
        tile: takes the tokens; those before them in its first page are there.
        new: as many tokens.
    """
    codec = codec_of(tile.format, _CPU)
    lead = tile.first % tile.format.row_tokens
    before = KV(*(part.new_empty(*part.shape[:2], lead, part.shape[3]) for part in new))
    if lead:
        unpack_here(tile._replace(first=tile.first - lead, tokens=lead), before)
    parts = packed_in_two(before, new, tile.kv)
    for values, pages in parts:
        codec.pack(values, pages)
    full, begun = full_and_begun(ledger, tile, parts)
    for values, pages in full:
        count = int(codec.overflowed(pages, values.shape[3]).sum())
        if count:
            slot_bytes = tile.format.row_tokens * values.shape[3] * values.itemsize
            raw = device.host_empty(count * slot_bytes).view(count, slot_bytes)
            _keep_here(device, codec, tile, raw, [(values, pages)])
    if begun:
        _keep_here(device, codec, tile, begun_slots(device, ledger), begun)


def _keep_here(
    device: Device,
    codec: Codec,
    tile: Tile,
    slots: torch.Tensor,
    parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    device.host_access(slots, write=True, purpose="pages as they are")
    taken = torch.zeros(1, dtype=torch.int64, device=_CPU)
    for values, pages in parts:
        codec.keep_raw(values, pages, slots, taken)
    tile.piece.refer_to([slots])


def copy_begun_page(device: Device, ledger: Ledger, source: Ledger) -> None:
    """Copy the tokens of a page that is not full, which ledgers do not share; both are at rest.

    Args:
        device: gives memory for pages that overflow.
        ledger: shares all tokens before those, and has memory for them.
        source: has them.
    """
    start, end = ledger.host_tokens, source.host_tokens
    for tile in map(in_memory, source.host_tiles(start, end)):
        geometry = source.geometry
        shape = geometry.batch, geometry.kv_heads, tile.tokens
        dims = geometry.key_dim, geometry.value_dim
        new = KV(*(torch.empty(*shape, dim, dtype=geometry.dtype, device=_CPU) for dim in dims))
        state_access(device, tile, write=False, purpose="a copied cache")
        unpack_here(tile, new)
        (place,) = ledger.extend_host(tile.tokens)
        state_access(device, place, write=True, purpose="a copied cache")
        pack_here(device, ledger, place, new)


def state_access(device: Device, tile: Tile, *, write: bool, purpose: str) -> None:
    """State that the host itself reads or writes a tile, and reads pages as they are."""
    for raw in tile.piece.raw:
        device.host_access(raw, write=False, purpose=purpose)
    device.host_access(tile.piece.memory, write=write, purpose=purpose)


def unpacked_works(work: Work, value_dim: int) -> Iterator[Work]:
    """Yield works that attend the same tokens as they are, of which few are unpacked at a time.

    Args:
        work: whose tiles may be packed, in memory of the CPU.
        value_dim: elements of a value.
    """
    if all(tile.format is Format.DENSE for tile in work.tiles):
        yield work
        return
    query, dims = work.query, (work.query.shape[-1], value_dim)
    for tile in work.tiles:
        for first in range(0, tile.tokens, _UNPACKED_TOKENS):
            tokens = min(_UNPACKED_TOKENS, tile.tokens - first)
            part = tile._replace(tokens=tokens, first=tile.first + first)
            yield dataclasses.replace(work, tiles=(_unpacked(part, dims, query.dtype),))


def _unpacked(tile: Tile, dims: tuple[int, int], dtype: torch.dtype) -> Tile:
    """Return a tile of new memory with the tokens of a packed one."""
    codec, parts = codec_of(tile.format, _CPU), []
    for pages, dim in zip(tile.kv, dims, strict=True):
        shape = (*pages.shape[:2], tile.tokens, dim)
        parts.append(torch.empty(shape, dtype=dtype, device=pages.device))
        unpack_from(codec, pages, tile.first, parts[-1])
    return tile_in_hand(KV(*parts))
