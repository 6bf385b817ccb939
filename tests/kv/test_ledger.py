"""The ledger against plain tensors: what it says of where tokens lie, and what lies there."""

import contextlib
import dataclasses
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.device.cpu import CpuDevice
from headinfer.kv.extent import Extent, Piece
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV, Geometry
from headinfer.kv.place import HostPlace

GEOMETRY = Geometry(batch=2, kv_heads=3, key_dim=4, value_dim=2, dtype=torch.float32)


def new_ledger(batch: int = 2) -> Ledger:
    return Ledger(dataclasses.replace(GEOMETRY, batch=batch), HostPlace(CpuDevice()))


def new_tokens(batch: int, tokens: int) -> KV:
    new = torch.randn(batch, 3, tokens, 6)
    return KV(new[..., :4], new[..., 4:])


def append(ledger: Ledger, new: KV) -> None:
    first = 0
    for tile in ledger.extend_host(new.tokens):
        for place, part in zip(tile.kv, new.cut(slice(first, first + tile.tokens)), strict=True):
            place.copy_(part)
        first += tile.tokens
    assert first == new.tokens


@dataclass
class Plain:
    """The same tokens as two plain tensors."""

    keys: torch.Tensor = field(default_factory=lambda: torch.empty(2, 3, 0, 4))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(2, 3, 0, 2))

    def append(self, new: KV) -> None:
        self.keys = torch.cat((self.keys, new.keys), dim=2)
        self.values = torch.cat((self.values, new.values), dim=2)

    def crop(self, tokens: int) -> None:
        self.keys, self.values = self.keys[:, :, :tokens], self.values[:, :, :tokens]

    def select(self, rows: list[int]) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def copy(self) -> "Plain":
        return Plain(self.keys, self.values)

    def check(self, ledger: Ledger, max_tokens: int | None) -> None:
        assert ledger.tokens == ledger.host_tokens == self.keys.shape[2]
        tiles = list(ledger.host_tiles(0, ledger.host_tokens, max_tokens=max_tokens))
        position = 0
        for tile in tiles:
            assert tile.start == position
            assert tile.tokens <= (max_tokens or tile.tokens)
            part = slice(position, position + tile.tokens)
            assert torch.equal(tile.kv.keys, self.keys[:, :, part])
            assert torch.equal(tile.kv.values, self.values[:, :, part])
            position += tile.tokens
        assert position == self.keys.shape[2]


changes = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 400)),
        st.tuples(st.just("crop"), st.integers(0, 300)),
        st.tuples(st.just("select"), st.integers(1, 4)),
        st.tuples(st.just("fork"), st.integers(0, 3)),
        st.tuples(st.just("clear"), st.integers(0, 3)),
    ),
    max_size=10,
)


@settings(deadline=None)
@given(
    reserve=st.integers(0, 900),
    steps=st.lists(st.tuples(st.integers(0, 3), changes), max_size=4),
    max_tokens=st.sampled_from([None, 1, 7, 300]),
)
def test_any_sequence_of_changes_of_ledgers_that_share_memory(
    reserve: int, steps: list[tuple[int, list[tuple[str, int]]]], max_tokens: int | None
) -> None:
    first = new_ledger()
    first.reserve(reserve)
    assert first.host_bytes == GEOMETRY.num_bytes(reserve)
    held = [(first, Plain())]
    for which, sequence in steps:
        for kind, amount in sequence:
            ledger, plain = held[which % len(held)]
            version, batch, tokens = ledger.version, plain.keys.shape[0], plain.keys.shape[2]
            if kind == "append":
                new = new_tokens(batch, amount)
                append(ledger, new)
                plain.append(new)
            elif kind == "crop":
                kept = max(tokens - amount, 0)
                ledger.crop(kept)
                plain.crop(kept)
            elif kind == "select":
                rows = [(row * 2 + 1) % batch for row in range(amount)]
                ledger.select_host(rows)
                plain.select(rows)
            elif kind == "fork":
                other = new_ledger(batch)
                other.share(ledger)
                held.append((other, plain.copy()))
            else:
                ledger.clear()
                plain.crop(0)
            assert kind == "fork" or ledger.version != version or tokens == plain.keys.shape[2]
            for other, wanted in held:  # what one of them does is not seen by the others
                wanted.check(other, max_tokens)
    for ledger, _ in held:
        ledger.clear()
        assert ledger.host_bytes == ledger.tokens == 0


def held_bytes(*ledgers: Ledger) -> int:
    """Return the host memory of ledgers, what they share counted once."""
    pieces = {
        id(tile.piece): tile.piece for ledger in ledgers for tile in ledger.host_tiles(0, 10**6)
    }
    return sum(piece.memory.numel() for piece in pieces.values())


def test_shared_tokens_take_no_memory_until_they_are_changed() -> None:
    first, second = new_ledger(), new_ledger()
    first.reserve(1010)
    append(first, new_tokens(2, 1000))
    second.share(first)
    append(first, new_tokens(2, 10))  # behind what is shared
    assert held_bytes(first, second) == GEOMETRY.num_bytes(1010)
    assert second.host_bytes == GEOMETRY.num_bytes(1010)  # as it may come to be
    append(second, new_tokens(2, 1))
    assert held_bytes(first, second) == GEOMETRY.num_bytes(1010 + 256)
    second.select_host([1, 0])
    assert held_bytes(first) == GEOMETRY.num_bytes(1010)
    assert held_bytes(second) == GEOMETRY.num_bytes(1000 + 256)


def test_memory_is_given_back_once_also_where_that_is_interrupted() -> None:
    """A piece counted down twice would be written to under another ledger's tokens."""

    class Interrupted(HostPlace):
        def give_back(self, extent: Extent) -> None:
            super().give_back(extent)
            raise KeyboardInterrupt

    first, new = new_ledger(), new_tokens(2, 50)
    append(first, new)
    second, third = Ledger(GEOMETRY, Interrupted(CpuDevice())), new_ledger()
    for other in (second, third):
        other.share(first)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            second.clear()
    third.select_host([1, 0])
    (tile,) = first.host_tiles(0, 50)
    assert tile.piece.holders == 1
    assert torch.equal(tile.kv.keys, new.keys)


def test_memory_is_left_to_another_ledger_once() -> None:
    first, second = new_ledger(), new_ledger()
    append(first, new_tokens(2, 700))
    second.share(first)
    second.crop(50)
    held = []
    for _ in range(3):
        append(second, new_tokens(2, 16))
        held.append(held_bytes(second))
    assert held == [held[0]] * 3
    assert second.tokens == 98


def test_rows_are_chosen_whatever_device_new_tensors_have_by_default() -> None:
    ledger, new = new_ledger(), new_tokens(2, 7)
    append(ledger, new)
    with torch.device("meta"):
        ledger.select_host([1, 0])
        ledger.select_host([1, 1, 0])
    (tile,) = ledger.host_tiles(0, 7)
    assert torch.equal(tile.kv.keys, new.keys[[0, 0, 1]])


def test_what_was_never_written_is_known() -> None:
    ledger = new_ledger()
    ledger.reserve(1000)
    append(ledger, new_tokens(2, 400))
    ledger.crop(300)
    assert ledger.unwritten_bytes == GEOMETRY.num_bytes(600)


def test_old_tokens_are_never_moved_by_growth() -> None:
    ledger = new_ledger()
    append(ledger, new_tokens(2, 10))
    before = next(ledger.host_tiles(0, 10)).kv.keys.data_ptr()
    append(ledger, new_tokens(2, 5000))
    assert next(ledger.host_tiles(0, 10)).kv.keys.data_ptr() == before


def test_one_heads_tokens_are_contiguous() -> None:
    ledger = new_ledger()
    ledger.reserve(100)
    ledger.extend_host(90)
    for tile in ledger.host_tiles(5, 60, groups=[slice(1, 3)]):
        assert tile.kv.keys.shape == (2, 2, 55, 4)
        assert tile.kv.keys[1, 1].is_contiguous()
        assert tile.kv.values[0, 0].is_contiguous()


def piece(tokens: int) -> Piece:
    return Piece(torch.empty(GEOMETRY.num_bytes(tokens), dtype=torch.uint8))


@settings(deadline=None)
@given(
    residents=st.integers(0, 50),
    tail=st.integers(0, 20),
    host=st.integers(0, 80),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    crop=st.integers(0, 120),
)
def test_each_token_is_attended_in_one_place(
    residents: int, tail: int, host: int, share: float, crop: int
) -> None:
    ledger = new_ledger()
    ledger.keep_residents(piece(50), 50)
    assert ledger.resident is not None
    append(ledger, new_tokens(2, host))
    ledger.extend(ledger.resident, residents if residents <= host else host)
    if tail:
        ledger.extend(ledger.begin_tail(piece(20), 20), tail)
    assert ledger.tokens == host + tail
    assert ledger.tail_tokens == tail
    ledger.crop(max(ledger.tokens - crop, 0))
    assert ledger.tokens == max(host + tail - crop, 0)
    first, end = ledger.held.streamed(share)
    near = [extent for extent in (ledger.resident, ledger.tail) if extent is not None]
    covered = [position for extent in near for position in range(extent.start, extent.end)]
    covered += range(first, end)
    covered += range(end, ledger.host_tokens)
    assert sorted(covered) == list(range(ledger.tokens))


def test_what_only_residents_hold_is_the_tail() -> None:
    ledger = new_ledger()
    ledger.keep_residents(piece(50), 50)
    assert ledger.resident is not None
    ledger.extend(ledger.resident, 30)
    assert (ledger.tokens, ledger.tail_tokens, ledger.held.streamed(0.0)) == (30, 30, (0, 0))
    ledger.extend_host(20)
    assert (ledger.tokens, ledger.tail_tokens, ledger.held.streamed(0.0)) == (30, 10, (20, 20))
    ledger.crop(15)
    assert (ledger.tokens, ledger.tail_tokens, ledger.held.streamed(0.0)) == (15, 0, (15, 15))
