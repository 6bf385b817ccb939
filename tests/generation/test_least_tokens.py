"""How many tokens a text has at least, whatever it says; what cannot be known is not told."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import headinfer
from headinfer.demo.tokenizer import build_tokenizer
from headinfer.errors import ContextLengthError, MemoryPlanError
from headinfer.generation import least_tokens
from headinfer.generation.least_tokens import LeastTokens
from headinfer.serving.desk import Desk
from saved_models import make_tokenizer
from tiny_models import shared_model

TEXTS = {
    "prose": "The strongbox of the mossy phoenix opens with 41-27. " * 40,
    "spaces": " " * 2000,
    "unknown words": "mzzptlk" * 300,
    "other writing": "日本語 naïve Ж 🙂\n" * 100,
    "marks": "e\u0301o\u0302\u0323 \u1112\u1161\u11ab" * 200,  # which NFC composes
    "control": "\x04\x06\x13a" * 300,
    "added": "<x>    " * 300,
}


def byte_level(*, lacking: str = "", normalizer: Any = None, **added: bool) -> Any:
    """Return a tokenizer of bytes and a few longer tokens, in the way of GPT-2's."""
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*lacking})
    longer = ["Ġ" * 2, "Ġ" * 4, "Ġ" * 8, "th", "the"]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *longer])}
    merges = [("Ġ", "Ġ"), ("Ġ" * 2, "Ġ" * 2), ("Ġ" * 4, "Ġ" * 4), ("t", "h"), ("th", "e")]
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_tokens([AddedToken("<x>", normalized=False, **added)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_fallback(known: int = 256) -> Any:
    """Return a tokenizer in the way of Llama 2's, which writes bytes it has no character for."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(known)), "▁", "t", "h", "▁▁", "th"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.BPE(
        vocabulary, [("▁", "▁"), ("t", "h")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    inner = Tokenizer(model)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def removing() -> Any:
    """Return a tokenizer that leaves out spaces."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


KEEPING: dict[str, Callable[[], Any]] = {
    "demo": build_tokenizer,
    "byte level": byte_level,
    "NFC": lambda: byte_level(normalizer=normalizers.NFC()),
    "bytes that it lacks": lambda: byte_level(lacking="ĄĆē"),
    "byte fallback": byte_fallback,
}
LOSING: dict[str, Callable[[], Any]] = {
    "words": make_tokenizer,
    "stripping": lambda: byte_level(normalizer=normalizers.Strip()),
    "swallowing": lambda: byte_level(rstrip=True),
    "removing": removing,
    "unknown bytes": lambda: byte_fallback(known=128),
}


@pytest.fixture(autouse=True)
def short_texts_count(monkeypatch) -> None:
    monkeypatch.setattr(least_tokens, "_SHORT_CHARS", 0)


@pytest.mark.covering
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*KEEPING, *LOSING])
def test_a_text_has_no_fewer_tokens(name: str, text: str) -> None:
    tokenizer = (KEEPING | LOSING)[name]()
    ids = tokenizer(TEXTS[text], add_special_tokens=False)["input_ids"]
    assert LeastTokens(tokenizer).of(TEXTS[text]) <= len(ids)


@pytest.mark.parametrize("name", [*KEEPING, *LOSING])
def test_only_where_all_is_kept_something_is_known(name: str) -> None:
    least = LeastTokens((KEEPING | LOSING)[name]()).of(TEXTS["prose"])
    assert (least > 0) is (name in KEEPING)


def test_a_short_text_is_left_to_the_tokenizer(monkeypatch) -> None:
    monkeypatch.undo()
    assert LeastTokens(build_tokenizer()).of(TEXTS["prose"]) == 0


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({}, ContextLengthError, r"at least 4,096 tokens, and .* made for 2,048; shorten"),
        ({"host_memory": "1MiB"}, MemoryPlanError, r"a prompt of at least 4,096 tokens need"),
    ],
    ids=["positions", "memory"],
)
def test_a_desk_refuses_a_text_by_its_bytes(
    options: dict[str, Any], error: type[Exception], told: str
) -> None:
    model, tokenizer = shared_model("llama3"), byte_level()
    with headinfer.attach(model, device="cpu", **options):
        desk = Desk(model, tokenizer, allow_long_prompts="host_memory" in options)
        try:
            with pytest.raises(error, match=told):
                desk.check_text("a" * 8 * 4096)
            desk.check_text("a" * 8 * 64)
        finally:
            desk.close(timeout_s=60.0)
