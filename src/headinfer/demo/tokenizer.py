"""The demo model's tokenizer: one token for each word of the demo, bytes for all other text.

It is a byte-level BPE without merges. A piece of text that is in the vocabulary is one token; any
other piece is spelled in bytes. So every text round-trips exactly. Pieces are cut as `PIECES` says,
which `count_tokens` uses as well.
"""

import re
from typing import TYPE_CHECKING

from headinfer.demo import prose, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PIECES = r"-\d\d(?!\d)|-\?\?| ?\p{L}+| ?\d\d|\d| ?[^\s\p{L}\p{N}]|\s+"
"""Pattern of a piece: half a number, a word, two digits or a mark, with the space before it."""

_PIECES_ASCII = re.compile(r"-\d\d(?!\d)|-\?\?| ?[A-Za-z]+| ?\d\d|\d| ?[^\sA-Za-z0-9]|\s+")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|> ' + message['content'] | trim + eos_token }}"
    "{% else %}"
    "{{ '<|user|>' + message['content'] | trim }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Chat template. The question mark and the assistant token stand where a fact says "opens with"."""


def vocabulary() -> list[str]:
    """List the tokens that are words, marks and halves of numbers, as text, in their ids' order.

    Words come in two forms, with and without a space before them.
    """
    sentences = [
        *prose.SENTENCES,
        *prose.FACTS,
        prose.KEEPER,
        prose.QUESTION,
        prose.CLOZE,
        prose.ANSWER,
    ]
    fillers = [filler for slot in prose.SLOTS.values() for filler in slot]
    plain = {
        word
        for text in sentences + fillers
        for word in re.findall(r"[A-Za-z]+", re.sub(r"{\w+}", "", text))
    }
    plain |= {word[0].upper() + word[1:] for word in plain}
    named = {*words.ADJECTIVES, *words.NOUNS, *words.FORENAMES, *words.SURNAMES}
    both_forms = [form for word in sorted(plain | named) for form in (word, " " + word)]
    numbers = [
        *words.FIRST_HALVES,
        *words.SECOND_HALVES,
        *(f"{number:02d}" for number in range(100)),
    ]
    missing = [
        words.MISSING_FIRST_HALF,
        words.MISSING_SECOND_HALF,
        words.MISSING_FORENAME,
        words.MISSING_SURNAME,
    ]
    return both_forms + numbers + missing + ["\n\n", " (", " -"]


def count_tokens(text: str) -> int:
    """Count the tokens of text made of the demo's own words, without a tokenizer."""
    return len(_PIECES_ASCII.findall(text))


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Make the tokenizer, ready to save."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = [*words.SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [byte_level.pre_tokenize_str(text)[0][0] for text in vocabulary()]
    # The alphabet has words of one letter already. A gap would leave the last ids without weights.
    ids = {token: idx for idx, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), byte_level]
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{words.BOS} $A",
        pair=f"{words.BOS} $A $B",
        special_tokens=[(words.BOS, ids[words.BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words.BOS,
        eos_token=words.EOS,
        pad_token=words.PAD,
        additional_special_tokens=[words.USER, words.ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1 << 20,
    )
