"""Host memory that is asked for ahead of need: in which pieces, and what a ledger makes of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import MemoryPlanError
from headinfer.kv.ahead import pieces_ahead
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import Geometry
from headinfer.kv.place import HostPlace

GEOMETRY = Geometry(batch=1, kv_heads=2, key_dim=4, value_dim=4, dtype=torch.float32)

sizes = st.integers(1, 200)


@given(tokens=st.integers(0, 5000), chunk=sizes, tile=sizes, most=st.integers(0, 200))
def test_pieces_are_all_tokens_and_grow_to_what_they_may_be(
    tokens: int, chunk: int, tile: int, most: int
) -> None:
    pieces = list(pieces_ahead(tokens, chunk_tokens=chunk, tile_tokens=tile, most_tokens=most))
    assert sum(pieces) == tokens
    assert all(0 < piece < max(most, tile) + chunk for piece in pieces)
    assert pieces[:-1] == sorted(pieces[:-1]), "a piece is smaller than one before it"
    assert pieces[:1] <= [2 * chunk], "the first chunk waits for more than it needs"


def test_a_long_prompt_has_few_pieces() -> None:
    k = 1024
    pieces = pieces_ahead(400 * k, chunk_tokens=8 * k, tile_tokens=16 * k, most_tokens=64 * k)
    assert [piece / k for piece in pieces] == [8, 8, 8, 12, 18, 27, 40.5, 60.75, 64, 64, 64, 25.75]
    (whole,) = pieces_ahead(10 * k, chunk_tokens=8 * k, tile_tokens=16 * k, most_tokens=64 * k)
    assert whole == 10 * k


class Counting(SimulatedDevice):
    """Notes what is got, and refuses what is over a limit."""

    def __init__(self, most_bytes: int = 2**20) -> None:
        super().__init__()
        self.got: list[int] = []
        self.most_bytes = most_bytes

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self.most_bytes:
            raise MemoryPlanError("cannot lock")
        self.got.append(num_bytes)
        return super().host_empty(num_bytes)


def asked(device: SimulatedDevice, *tokens: int) -> Ledger:
    """Return a ledger for which so many tokens were asked, in pieces."""
    ledger = Ledger(GEOMETRY, HostPlace(device))
    for piece in tokens:
        ledger.coming.ask(GEOMETRY, piece)
    return ledger


def test_a_ledger_waits_for_no_more_than_it_needs() -> None:
    device = Counting()
    ledger = asked(device, 5, 7, 9)
    assert (ledger.capacity_tokens, ledger.promised_tokens) == (0, 21)
    assert ledger.host_bytes == ledger.coming.awaited_bytes == GEOMETRY.num_bytes(21)
    ledger.reserve(6)
    assert device.got == [GEOMETRY.num_bytes(5), GEOMETRY.num_bytes(7)]
    assert (ledger.capacity_tokens, ledger.promised_tokens) == (12, 21)
    assert ledger.coming.awaited_bytes == GEOMETRY.num_bytes(9)
    assert [tile.tokens for tile in ledger.extend_host(14)] == [5, 7, 2]
    assert ledger.missing_tokens(21) == 0
    ledger.reserve(22)
    assert ledger.capacity_tokens > 21


@pytest.mark.parametrize("change", ["clear", "select_host"])
def test_what_is_not_needed_any_more_is_not_got(change: str) -> None:
    device = Counting()
    ledger = asked(device, 5, 7)
    ledger.extend_host(3)
    if change == "clear":
        ledger.clear()
    else:
        ledger.select_host([0, 0])  # rows are twice as many, and what was asked for too small
    assert ledger.promised_tokens == ledger.capacity_tokens
    ledger.reserve(30)
    assert ledger.host_bytes == ledger.geometry.num_bytes(ledger.capacity_tokens)


def test_memory_that_cannot_be_had_is_an_error_where_it_is_needed_and_may_be_asked_again() -> None:
    device = Counting(most_bytes=GEOMETRY.num_bytes(6))
    ledger = asked(device, 5, 7, 4)
    ledger.extend_host(4)
    with pytest.raises(MemoryPlanError, match="cannot lock"):
        ledger.reserve(6)
    assert (ledger.capacity_tokens, ledger.promised_tokens) == (5, 5)
    device.most_bytes = 2**20
    ledger.coming.ask(GEOMETRY, 7)
    ledger.reserve(6)
    assert ledger.capacity_tokens == 12


def test_an_interruption_loses_nothing_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Counting()
    ledger = asked(device, 5, 7)

    def interrupt(_num_bytes: int) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device, "host_empty", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ledger.reserve(3)
    assert ledger.promised_tokens == 12
    assert sum(tile.tokens for tile in ledger.extend_host(12)) == 12
