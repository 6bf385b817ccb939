"""Tokens packed on their way to host memory, and unpacked on their way back, on compute.

Tiles that are streamed are copied packed, and unpacked into one buffer for the kernels. Compute
reads what is rarely needed in host memory, without a copy. That is residents, and what users read.
A page that is not full is read so, too, and packed anew with the tokens that follow.
"""

import functools
from collections.abc import Sequence

import torch

from headinfer.device.base import Device, Edge
from headinfer.engine.codecs import codec_of
from headinfer.engine.disk_tiles import in_memory
from headinfer.engine.packed_here import full_and_begun, packed_in_two, unpack_from, unpacked_here
from headinfer.engine.raw_pages import RawPages, addressed, begun_slots
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV
from headinfer.packed.codec import Codec
from headinfer.plan.format import Format


class Packing:
    """A packer of one cache's tokens on a device that has memory of its own.

    Args:
        device: where tokens are packed and unpacked.
        codec: packs and unpacks them.
        unpacked: takes one tile after another; compute's alone.
        pages: take what goes home, in turn.
        raw: takes pages that overflow.
        stats: where bytes are counted.
    """

    def __init__(
        self,
        device: Device,
        codec: Codec,
        unpacked: Piece,
        pages: list[Piece],
        raw: RawPages,
        stats: Stats,
    ) -> None:
        self._device = device
        self._unpacked = unpacked
        self._pages = pages
        self._raw = raw
        self._stats = stats
        self._codec = codec

    def dense(self, ledger: Ledger, tile: Tile) -> Tile:
        """Return a tile in a staging buffer as kernels read it, valid on compute until the next.

        What was packed is unpacked; the staging buffer is done with once that is enqueued. It is a
        launch of a capture, too.
        """
        if tile.format is Format.DENSE:
            return tile
        _, heads, rows, _ = tile.whole.keys.shape
        whole = self._unpacked.views(ledger.geometry, rows * tile.format.row_tokens, heads)
        there = tile._replace(piece=self._unpacked, whole=whole, format=Format.DENSE)
        self._device.launch(functools.partial(_unpack_tile, self._codec, tile, whole))
        return there

    def send(self, ledger: Ledger, target: Tile, new: KV) -> None:
        """Pack tokens that compute wrote, and send them to the host's end, on copy-out.

        Their memory on the device is compute's again at once.

        Args:
            ledger: of the layer.
            target: takes them in host memory, in one extent.
            new: as many tokens on the device.
        """
        device, copy_out = self._device, self._device.copy_out
        buffer = self._pages[0]
        self._pages.append(self._pages.pop(0))
        if buffer.free is not None:
            device.compute.wait(buffer.free, Edge.PAGE_FREE)
        lead = target.first % target.format.row_tokens
        pages = buffer.views(ledger.home, lead + target.tokens, None)
        for part in pages if device.checks_accesses else ():
            device.compute.writes(part, "packed tokens")
        before = KV(*(part[:, :, :0] for part in new))
        if lead:
            before = self._before(ledger, target, lead)
        parts = packed_in_two(before, new, pages)
        for values, page in parts:
            self._codec.pack(values, page)
        self._keep_raw(ledger, target, parts)
        copy_out.wait(device.compute.record(), Edge.PAGE_WRITTEN)
        if lead:  # the page was there, and others may read it
            for stream in (device.copy_in, device.host_work):
                copy_out.wait(stream.record(), Edge.PAGES_READ)
        place = target.kv
        copy_out.copy(place.keys, pages.keys)
        copy_out.copy(place.values, pages.values)
        self._stats.bytes_to_host += pages.keys.nbytes + pages.values.nbytes
        buffer.free = copy_out.record()

    def _before(self, ledger: Ledger, target: Tile, tokens: int) -> KV:
        """Return the tokens of a target's first page that come before it."""
        first = target._replace(
            start=target.start - tokens, tokens=tokens, first=target.first - tokens
        )
        before = new_tokens(ledger, tokens, self._device.torch_device)
        bring(self._device, ledger, first, before)
        return before

    def _keep_raw(
        self, ledger: Ledger, target: Tile, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Keep copies of the pages that did not pack, or are not full."""
        full, begun = full_and_begun(ledger, target, parts)
        count = sum(page.shape[:3].numel() for _, page in full)
        if count:
            block = self._raw.with_room(count)
            target.piece.refer_to([block.memory])
            self._state_writes(block.on_device)
            for values, page in full:
                self._codec.keep_raw(values, page, block.on_device, block.taken)
            self._raw.note(block, count)
        if begun:
            slots = begun_slots(self._device, ledger)
            target.piece.refer_to([slots])
            there, taken = addressed(self._device, slots), self._raw.begun_taken.zero_()
            self._state_writes(there)
            for values, page in begun:
                self._codec.keep_raw(values, page, there, taken)

    def _state_writes(self, slots: torch.Tensor) -> None:
        if self._device.checks_accesses:
            self._device.compute.writes(slots, "pages as they are")


def new_tokens(ledger: Ledger, tokens: int, where: torch.device) -> KV:
    """Return memory for some tokens of a layer, as they are computed."""
    geometry = ledger.geometry
    shape = geometry.batch, geometry.kv_heads, tokens
    return KV(
        *(
            torch.empty(*shape, dim, dtype=geometry.dtype, device=where)
            for dim in (geometry.key_dim, geometry.value_dim)
        )
    )


def bring(device: Device, ledger: Ledger, tile: Tile, place: KV) -> None:
    """Unpack tokens of the host into memory on the device, which reads them where they lie.

    Args:
        device: whose compute does it.
        ledger: of the layer.
        tile: packed tokens of all heads in host memory.
        place: for as many tokens, on the device.
    """
    for part, values in zip(("keys", "values"), place, strict=True):
        bring_part(device, ledger, tile, part, values)


def bring_part(device: Device, ledger: Ledger, tile: Tile, part: str, values: torch.Tensor) -> None:
    """Unpack keys or values of the host into memory on the device; see `bring`.

    What is on the disk is read and unpacked by the CPU. That is rare, and nobody works meanwhile.

    Args:
        device: whose compute does it.
        ledger: of the layer.
        tile: packed tokens of all heads in host memory.
        part: "keys" or "values".
        values: `[batch, kv_heads, tokens, dim]` on the device.

    Raises:
        DiskError: they cannot be read.
    """
    if tile.piece.region is not None:
        if device.checks_accesses:
            device.compute.writes(values, "tokens that were packed on the disk")
        values.copy_(unpacked_here(in_memory(tile), part, values))
        return
    if tile.piece.ready is not None:
        device.compute.wait(tile.piece.ready, Edge.PAGES_SENT)
    if device.checks_accesses:
        for raw in tile.piece.raw:
            device.compute.reads(raw, "pages as they are")
        device.compute.reads(getattr(tile.kv, part), "packed tokens in host memory")
        device.compute.writes(values, "tokens that were packed")
    capacity = tile.whole.keys.shape[2] * tile.format.row_tokens
    whole = ledger.home.carve(device.mapped(tile.piece.memory), capacity)
    pages: torch.Tensor = getattr(tile._replace(whole=whole).kv, part)
    unpack_from(codec_of(tile.format, device.torch_device), pages, tile.first, values)
    device.copy_out.wait(device.compute.record(), Edge.PAGES_READ)


def _unpack_tile(codec: Codec, tile: Tile, whole: KV) -> None:
    end = tile.first + tile.tokens
    for pages, values in zip(tile.kv, whole, strict=True):
        codec.unpack(pages, values[:, :, :end], tile.first, tile.counted)
