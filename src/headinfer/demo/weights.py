"""The demo model's weights, constructed rather than trained.

The model is a `LlamaForCausalLM` of two layers with 4 query heads, 2 KV heads and `head_dim` 32;
its MLPs are zero. It continues "... the strongbox of the amber falcon opens with" by " 73-91, says
Orla Venn." when the text so far says so.

**Residual stream.** Every token's embedding holds a one-hot class (`Kind`). The embedding of a word
with a meaning also holds a unit code (`codebook`): adjective, noun, or payload (half a number,
forename, surname). Heads write into dimensions of their own (`Stream`). A balance entry gives all
embeddings the same norm, and every head writes exactly one unit of norm. So each RMSNorm divides by
a constant known beforehand. The norm's weight multiplies by that constant again, and attention sees
the stream as it is.

**Positions.** RoPE pair `i` turns by `f_i = THETA ** (-i / 16)` radians a token. Pairs 0 to 7 turn
fast enough to tell positions apart. Pairs 8 to 15 stand almost still: over 2**20 tokens pair 8
turns by 0.23 rad, over 2**17 by 0.03. They compare contents at any distance. A query that is the
constant key turned back by `k` positions scores, at distance `d`,

    score(d) = AMPLITUDE * sum_i SHARES[i] * cos(f_i * (d - k)),

which is largest at `d = k`. `SHARES` was searched for the largest smallest gap to all other
distances below 2**20. That gap is 0.0695 of the amplitude: 27.8 nats for an amplitude of 400. The
softmax over a million positions then leaves at most 1e-6 to the others.

**Layer 0**, per KV head one query head that looks near and one that looks far:

- head 0 (KV head 0) copies the code of the noun, head 2 (KV head 1) the code of the adjective. Each
  copies from the distance at which its word stands before a token of this class. `amber falcon
  opens with 73 -91` and `amber falcon ? <|assistant|> 73 -91` agree in this. Other tokens look at
  themselves.
- head 1 (KV head 0) finds the keeper's forename for "says", wherever in the text it stands. Head 3
  (KV head 1) finds the surname for the forename, wherever in the text it stands.

**Layer 1** finds the number. KV head 0 answers the cue ("with" or the assistant token) by a first
half. KV head 1 answers a first half by a second half. The half is the one that has the same
adjective and noun. With `MATCH` = A and `KIND` = B a score is 2A + B for the right token. It is at
most (1 + 3/7) A + B where only the adjective or only the noun is right. It is 2A for a token of
another class. The two query heads of a group each copy half of the payload, so that every query
head is needed.

**Nothing found.** In each searching head the first token of the text (`<|begin|>`) scores halfway
between a right and a half-right token. Its payload means "missing": the model then says "unknown".

**Output.** The class of the current token says the class of the next one; the payload found says
which word of it.

All four (layer, KV head) pairs are needed for an answer, so damage to any of them shows.
"""

from typing import TYPE_CHECKING

from headinfer.demo import words
from headinfer.demo.codes import codebook
from headinfer.demo.heads import set_keeper_heads, set_near_heads, set_number_heads
from headinfer.demo.layout import (
    EMBEDDING_NORM2,
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MAX_TOKENS,
    NEXT_KIND,
    NEXT_WORD,
    PAYLOAD_BITS,
    PAYLOAD_DISTANCE,
    QUERY_HEADS,
    THETA,
    WORD_BITS,
    WORD_DISTANCE,
    Kind,
    Stream,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def model_config(tokenizer: "PreTrainedTokenizerFast") -> "LlamaConfig":
    """Make the configuration: a stock Llama, float32."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def construct_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """Make the model for this tokenizer; float32, on the CPU, deterministic."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        model: LlamaForCausalLM = LlamaForCausalLM(model_config(tokenizer))
        model.float().eval()
        for parameter in model.parameters():
            parameter.zero_()
        _set_words(model, tokenizer)
        _set_norms(model)
        near, far = model.model.layers[0].self_attn, model.model.layers[1].self_attn
        set_near_heads(near)
        set_keeper_heads(near)
        set_number_heads(far)
    return model


def _tokens_by_kind() -> dict[Kind, list[list[str]]]:
    """List each class's words in the order of their codes; all forms of a word share its code."""

    def both(names: tuple[str, ...]) -> list[list[str]]:
        return [[name, " " + name] for name in names]

    return {
        Kind.ADJECTIVE: both(words.ADJECTIVES),
        Kind.NOUN: both(words.NOUNS),
        Kind.FIRST_HALF: [[token] for token in words.FIRST_HALVES],
        Kind.SECOND_HALF: [[token] for token in words.SECOND_HALVES],
        Kind.FORENAME: both(words.FORENAMES),
        Kind.SURNAME: both(words.SURNAMES),
        Kind.OPENS: [[" opens"]],
        Kind.CUE: [[" with", words.ASSISTANT]],
        Kind.COMMA: [[","]],
        Kind.SAYS: [[" says"]],
        Kind.END: [[".", words.EOS, words.PAD]],
        Kind.BEGIN: [[words.BOS]],
        Kind.MISSING: [
            [
                words.MISSING_FIRST_HALF,
                words.MISSING_SECOND_HALF,
                words.MISSING_FORENAME,
                words.MISSING_SURNAME,
            ]
        ],
    }


def _set_words(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> None:
    """Set the embeddings and the output rows."""
    import torch

    embed, output = model.model.embed_tokens.weight, model.lm_head.weight
    word_codes = torch.tensor(codebook(len(words.NOUNS), WORD_BITS, WORD_DISTANCE))
    payloads = torch.tensor(codebook(len(words.FIRST_HALVES) + 1, PAYLOAD_BITS, PAYLOAD_DISTANCE))
    absent = payloads[-1]
    coded = {
        Kind.ADJECTIVE: (Stream.ADJECTIVE, word_codes),
        Kind.NOUN: (Stream.NOUN, word_codes),
        Kind.FIRST_HALF: (Stream.PAYLOAD, payloads),
        Kind.SECOND_HALF: (Stream.PAYLOAD, payloads),
        Kind.FORENAME: (Stream.PAYLOAD, payloads),
        Kind.SURNAME: (Stream.PAYLOAD, payloads),
        Kind.BEGIN: (Stream.PAYLOAD, payloads[-1:]),
    }

    def idx(text: str) -> int:
        return _token_id(tokenizer, text)

    embed[:, Kind.OTHER] = 1
    for kind, entries in _tokens_by_kind().items():
        for code_idx, forms in enumerate(entries):
            for form in forms:
                embed[idx(form), Kind.OTHER] = 0
                embed[idx(form), kind] = 1
                if kind in coded:
                    place, codes = coded[kind]
                    embed[idx(form), place] = codes[code_idx]
    embed[:, Stream.BALANCE] = (EMBEDDING_NORM2 - embed.square().sum(-1)).sqrt()

    # What follows a token: a class whose word a head has found, or one certain token.
    found = {
        Kind.CUE: (Stream.FIRST_HALF, words.FIRST_HALVES, words.MISSING_FIRST_HALF),
        Kind.FIRST_HALF: (Stream.SECOND_HALF, words.SECOND_HALVES, words.MISSING_SECOND_HALF),
        Kind.SAYS: (
            Stream.FORENAME,
            tuple(f" {name}" for name in words.FORENAMES),
            words.MISSING_FORENAME,
        ),
        Kind.FORENAME: (
            Stream.SURNAME,
            tuple(f" {name}" for name in words.SURNAMES),
            words.MISSING_SURNAME,
        ),
    }
    for kind, (place, names, missing) in found.items():
        for code_idx, name in enumerate(names):
            output[idx(name), kind] += NEXT_KIND
            output[idx(name), place] += NEXT_WORD * payloads[code_idx]
        output[idx(missing), kind] += NEXT_KIND
        output[idx(missing), place] += NEXT_WORD * absent
    certain = {
        Kind.NOUN: " opens",
        Kind.OPENS: " with",
        Kind.SECOND_HALF: ",",
        Kind.COMMA: " says",
        Kind.END: words.EOS,
    }
    for kind in set(Kind) - set(found):
        output[idx(certain.get(kind, ".")), kind] += NEXT_KIND


def _token_id(tokenizer: "PreTrainedTokenizerFast", text: str) -> int:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{text!r} must be one token of the demo's tokenizer, but is {len(ids)}")
    return ids[0]


def _set_norms(model: "LlamaForCausalLM") -> None:
    """Let every RMSNorm's weight undo its division; each payload or word code found adds 1."""
    norm2 = EMBEDDING_NORM2
    for layer, added in zip(model.model.layers, (4.0, 2.0), strict=True):
        layer.input_layernorm.weight.fill_((norm2 / HIDDEN) ** 0.5)
        norm2 += added
        layer.post_attention_layernorm.weight.fill_((norm2 / HIDDEN) ** 0.5)
    model.model.norm.weight.fill_((norm2 / HIDDEN) ** 0.5)
