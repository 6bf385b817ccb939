"""Ways of generating, for stock and attached models, and how their results are compared."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from families import TEXT_TOKENS, VOCAB
from headinfer.integration.calls import cache_name

NEW_TOKENS = 14
TOLERANCE = 1e-4
"""Of logits in float32, relative to their norm."""

NewCache = Callable[[], Any]


@dataclass(frozen=True)
class Result:
    """What a mode gave.

    Attributes:
        tokens: `[rows, tokens]`; none where only logits are compared.
        logits: one tensor `[rows, ..., vocab]` for each step.
        prompt_tokens: of `tokens`, how many no step chose.
    """

    tokens: torch.Tensor
    logits: list[torch.Tensor]
    prompt_tokens: int


def text(rows: int, tokens: int, *, seed: int = 1) -> torch.Tensor:
    """Return random text tokens `[rows, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TEXT_TOKENS, (rows, tokens), generator=generator)


def _left_padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    tokens, mask = text(len(lengths), max(lengths)), torch.ones(len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        tokens[row, : max(lengths) - length] = 0
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _generate(
    model: PreTrainedModel, new_cache: NewCache, *, cache: Any = None, **options: Any
) -> Result:
    torch.manual_seed(5)
    inputs = options.get("input_ids", options.get("inputs_embeds"))
    options.setdefault("attention_mask", torch.ones(inputs.shape[:2], dtype=torch.long))
    output = model.generate(
        **{cache_name(model): new_cache() if cache is None else cache},
        **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **options},
        suppress_tokens=[0, 1, 2, *range(TEXT_TOKENS, VOCAB)],
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = output.sequences.shape[1] - len(output.logits)
    return Result(output.sequences, list(output.logits), chosen)


def greedy(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(model, new_cache, input_ids=text(1, 61))


def sampling(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(
        model,
        new_cache,
        input_ids=text(2, 43),
        do_sample=True,
        top_k=20,
        num_return_sequences=2,
    )


def beams(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(model, new_cache, input_ids=text(2, 40), num_beams=3, num_return_sequences=2)


def sampled_beams(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(model, new_cache, input_ids=text(1, 45), num_beams=2, do_sample=True, top_k=20)


def assisted(model: PreTrainedModel, new_cache: NewCache) -> Result:
    # A noisy copy guesses some tokens right and others wrong.
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in assistant.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * parameter.abs().mean() * 0.1)
    return _generate(model, new_cache, input_ids=text(1, 47), assistant_model=assistant)


def prompt_lookup(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(
        model, new_cache, input_ids=text(1, 9).repeat(1, 6), prompt_lookup_num_tokens=4
    )


def left_padding(model: PreTrainedModel, new_cache: NewCache) -> Result:
    return _generate(model, new_cache, **_left_padded([52, 33, 7]))


def next_turns(model: PreTrainedModel, new_cache: NewCache) -> Result:
    cache, tokens, logits = new_cache(), torch.empty(1, 0, dtype=torch.long), []
    for turn in (37, 1, 29):
        tokens = torch.cat((tokens, text(1, turn, seed=turn)), dim=1)
        result = _generate(model, new_cache, cache=cache, input_ids=tokens, max_new_tokens=6)
        tokens = result.tokens
        logits += result.logits
    return Result(tokens, logits, tokens.shape[1])


def embeddings(model: PreTrainedModel, new_cache: NewCache) -> Result:
    embedded = model.get_input_embeddings()(text(1, 50))
    return _generate(model, new_cache, inputs_embeds=embedded)


def by_hand(model: PreTrainedModel, new_cache: NewCache) -> Result:
    """A loop with the tokens and the cache alone, with all logits of the prompt."""
    argument = {cache_name(model): new_cache(), "use_cache": True}
    tokens = text(2, 48)
    output = model(input_ids=tokens, **argument)
    logits = [output.logits]
    for _ in range(NEW_TOKENS):
        new = _choose(logits[-1])
        tokens = torch.cat((tokens, new), dim=1)
        logits.append(model(input_ids=new, **argument).logits)
    return Result(tokens, logits, tokens.shape[1])


def by_hand_padded(model: PreTrainedModel, new_cache: NewCache) -> Result:
    """A loop over a padded batch, with mask and positions, in which some steps are long."""
    argument = {cache_name(model): new_cache(), "use_cache": True}
    accepted = inspect.signature(model.forward).parameters
    inputs = _left_padded([44, 21])
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    new, logits = tokens, []
    for step in range(NEW_TOKENS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given = {"position_ids": positions} if "position_ids" in accepted else {}
        logits.append(model(input_ids=new, attention_mask=mask, **given, **argument).logits)
        speaks = step % 5 == 4  # the user, whose words come at once
        new = text(2, 15, seed=step) if speaks else _choose(logits[-1])
        tokens = torch.cat((tokens, new), dim=1)
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
    # What pads attend differs and means nothing.
    logits[0] = logits[0] * inputs["attention_mask"][..., None]
    return Result(tokens, logits, tokens.shape[1])


def _choose(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1:, 3:TEXT_TOKENS].argmax(-1) + 3


MODES: dict[str, Callable[[PreTrainedModel, NewCache], Result]] = {
    mode.__name__.replace("_", "-"): mode
    for mode in (
        greedy,
        sampling,
        beams,
        sampled_beams,
        assisted,
        prompt_lookup,
        left_padding,
        next_turns,
        embeddings,
        by_hand,
        by_hand_padded,
    )
}


def stock(model: PreTrainedModel, mode: str) -> Result:
    """Run a mode with transformers' own cache."""
    return MODES[mode](model, lambda: DynamicCache(config=model.config))


def compare(ours: Result, expected: Result) -> str:
    """Return "equal", "tie" or what differs.

    Up to the first token that differs the logits must agree; a token may differ where stock's own
    choice hung by less than the tolerance, and nothing can be said of what follows it.
    """
    worst = 0.0
    for step, (got, want) in enumerate(zip(ours.logits, expected.logits, strict=False)):
        position = expected.prompt_tokens + step
        if got.shape != want.shape:
            return f"step {step}: logits {tuple(got.shape)} instead of {tuple(want.shape)}"
        finite = want.isfinite()
        if not torch.equal(finite, got.isfinite()):
            return f"step {step}: other logits are infinite or not a number"
        got, want = got[finite], want[finite]
        worst = max(worst, float((got - want).norm() / want.norm().clamp(min=1e-6)))
        if worst > TOLERANCE:
            return f"step {step}: logits off by {worst:.1e}"
        if position < expected.tokens.shape[1] and not torch.equal(
            ours.tokens[:, position], expected.tokens[:, position]
        ):
            return _tie(expected.logits[step], step)
    if not torch.equal(ours.tokens, expected.tokens):
        return "tokens differ, logits do not"
    return "equal"


def _tie(logits: torch.Tensor, step: int) -> str:
    best = logits.flatten(0, -2)[:, 3:TEXT_TOKENS].topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min() / logits[logits.isfinite()].abs().max())
    return "tie" if gap < TOLERANCE else f"step {step}: tokens differ, logits do not"
