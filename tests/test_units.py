import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import OptionError
from headinfer.units import (
    counted,
    counted_tokens,
    format_bytes,
    format_si,
    format_tokens,
    parse_bytes,
    parse_tokens,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 gib ", 3 * 2**29),
        ("2_000_000", 2_000_000),
        ("24 B", 24),
        ("7B", 7),
        (2**20, 2**20),
    ],
)
def test_bytes(text: str | int, wanted: int) -> None:
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"), [("128K", 131072), ("1M", 2**20), ("1_000_000", 10**6), ("0.5k", 512)]
)
def test_tokens(text: str, wanted: int) -> None:
    assert parse_tokens(text) == wanted


@pytest.mark.parametrize("text", ["", "GiB", "24 parsecs", "-1", "0", "1e3", "1,000", "24G", 0, -5])
def test_what_is_not_a_size_is_refused_with_an_example(text: str | int) -> None:
    for parse in (parse_bytes, parse_tokens):
        with pytest.raises(OptionError, match=r"must be positive|write for example"):
            parse(text)


@given(st.integers(1, 2**36))
def test_formatted_tokens_parse_back(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens).replace(",", "")) == tokens


@pytest.mark.parametrize(
    ("size_bytes", "wanted"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**10, "1.00 KiB"),
        (3 * 2**29, "1.50 GiB"),
        (2**40, "1.00 TiB"),
    ],
)
def test_formatted_bytes(size_bytes: int, wanted: str) -> None:
    assert format_bytes(size_bytes) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0, "0.00"),
        (3.984, "3.98"),
        (999.4, "999"),
        (999.5, "1.00K"),
        (20_971_520, "21.0M"),
        (165e12, "165T"),
        (9e24, "9.00Y"),
    ],
)
def test_numbers_with_prefixes_of_1000(value: float, wanted: str) -> None:
    assert format_si(value) == wanted


def test_numbers_with_a_unit() -> None:
    assert format_si(165e12, "FLOP/s") == "165 TFLOP/s"
    assert format_si(5, "B/s") == "5.00 B/s"


def test_counts_beyond_reason_are_refused() -> None:
    with pytest.raises(OptionError, match="more than 68,719,476,736, the most"):
        parse_tokens("99999999999999999999")


@pytest.mark.parametrize("size", ["24", " 24 ", "8.5", 24, "1_000_000", 2**20 - 1])
def test_small_sizes_without_a_unit_are_refused_with_a_hint(size: str | int) -> None:
    with pytest.raises(OptionError, match=f"did you mean '{str(size).strip()}GiB'"):
        parse_bytes(size)


@pytest.mark.parametrize("value", [24e9, 4096.0, True, False, None, b"24GiB"])
def test_what_is_neither_text_nor_an_integer_is_refused(value: object) -> None:
    for parse in (parse_bytes, parse_tokens):
        with pytest.raises(OptionError, match=r"must be .*not ") as refusal:
            parse(value)  # type: ignore[arg-type]  # that is the mistake
        assert ("; write " in str(refusal.value)) == isinstance(value, float)


def test_integers_of_any_kind_are_taken() -> None:
    assert parse_tokens(np.int64(4096)) == 4096  # type: ignore[arg-type]  # it is as good as one
    assert parse_bytes(np.int64(2**30)) == 2**30  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), (2048, "2K tokens")]
)
def test_one_token_is_singular(count: int, said: str) -> None:
    assert counted_tokens(count) == said


@pytest.mark.parametrize(
    ("count", "one", "said"),
    [
        (0, "row", "0 rows"),
        (1, "KV head", "1 KV head"),
        (1500, "row", "1,500 rows"),
        (2, "process", "2 processes"),
    ],
)
def test_a_count_has_its_noun(count: int, one: str, said: str) -> None:
    assert counted(count, one) == said
