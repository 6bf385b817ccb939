"""The packed code in torch: every bit comes back, and pages say what they hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.packed.layout import PAGE_TOKENS, PageLayout, num_pages, packs
from headinfer.packed.reference import overflowed, pack, raw_address, set_raw_address, unpack
from packed_values import KINDS, bits_of, drawn, keep_raw

shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.sampled_from([16, 48, 64, 128])
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_every_bit_comes_back(shape: tuple[int, int, int, int], kind: str, seed: int) -> None:
    values = drawn(kind, shape, seed)
    pages = pack(values)
    kept = keep_raw(pages, values)
    assert torch.equal(bits_of(unpack(pages, shape[-1], shape[2])), bits_of(values))
    del kept


@settings(max_examples=30, deadline=None)
@given(data=st.data(), dim=st.sampled_from([16, 256]))
def test_bits_of_anybodys_choice_come_back(data: st.DataObject, dim: int) -> None:
    """A few words stand anywhere in a page of others, so that escapes are few or many."""
    words = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=4))
    tokens = data.draw(st.integers(1, PAGE_TOKENS + 1))
    places = data.draw(st.lists(st.integers(0, tokens * dim - 1), max_size=20))
    bits = torch.full((tokens * dim,), words[0])
    for place, word in zip(places, words[1:] * len(places), strict=False):
        bits[place] = word
    values = bits.to(torch.int16).view(1, 1, tokens, dim).view(torch.bfloat16)
    pages = pack(values)
    kept = keep_raw(pages, values)
    assert torch.equal(bits_of(unpack(pages, dim, tokens)), bits_of(values))
    del kept


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_a_page_overflows_with_one_escape_more_than_there_is_room_for(dim: int) -> None:
    shape = (2, 1, 150, dim)
    assert not overflowed(pack(drawn("full", shape)), dim).any()
    over = overflowed(pack(drawn("one too many", shape)), dim)
    assert over.shape == (2, 1, 3)
    assert over.all()


def test_a_page_knows_where_its_values_are_kept() -> None:
    pages = pack(drawn("any bits", (1, 1, 64, 64)))
    assert raw_address(pages[0, 0, 0], 64) == 0
    set_raw_address(pages[0, 0, 0], 64, 2**63 - 5)
    assert raw_address(pages[0, 0, 0], 64) == 2**63 - 5
    assert overflowed(pages, 64).all()


def test_pages_are_written_and_read_where_they_lie() -> None:
    """Both sides may be cuts of other memory, and values of any strides."""
    values = drawn("special", (2, 100, 3, 64)).transpose(1, 2)
    memory = torch.full((2, 5, 7, PageLayout(64).page_bytes), 7, dtype=torch.uint8)
    cut = memory[:, 1:4, 2:4]
    assert pack(values, cut) is cut
    assert torch.equal(cut, pack(values.contiguous()))
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 1:4, :2] == 7).all()
    target = torch.zeros(2, 3, 100, 80, dtype=torch.bfloat16)
    assert unpack(cut, 64, 100, target[..., :64]).data_ptr() == target.data_ptr()
    assert torch.equal(bits_of(target[..., :64]), bits_of(values))
    assert not target[..., 64:].any()


def test_the_first_tokens_of_pages_are_unpacked_alone() -> None:
    values = drawn("normal", (1, 2, 200, 64))
    assert torch.equal(unpack(pack(values), 64, 70), values[:, :, :70])


def test_sizes() -> None:
    """Whole cache lines, and at most 12.35 bits a value where heads are as most are."""
    for dim in (64, 96, 128, 256):
        layout = PageLayout(dim)
        assert layout.page_bytes % 64 == 0
        assert layout.page_bytes * 8 <= 12.35 * PAGE_TOKENS * dim
        assert layout.exponents_at + layout.max_escapes <= layout.page_bytes
    assert [num_pages(tokens) for tokens in (0, 1, 64, 65)] == [0, 1, 1, 2]
    assert [dim for dim in (0, 8, 16, 40, 64, 80, 1024, 1040) if packs(dim)] == [16, 64, 80, 1024]
