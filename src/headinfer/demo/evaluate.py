"""Ask a model every question of a document and count the right answers.

A document is prefilled once. Each question continues from that cache, which is cropped back
afterwards. So a cache that holds anything wrong, or that does not crop exactly, costs answers.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headinfer.demo.document import Document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer: one question with the right answer and what the model said."""

    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the model gave exactly the right answer."""
        return self.given == self.expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A result of asking all questions of some documents.

    Attributes:
        answers: All answers, document after document.
        prompt_tokens: Most tokens of any prompt.
        prefill_s: Seconds of each document's prefill.
        answer_s: Seconds of all answers of each document.
    """

    answers: tuple[Answer, ...]
    prompt_tokens: int
    prefill_s: tuple[float, ...]
    answer_s: tuple[float, ...]

    @property
    def num_right(self) -> int:
        """How many answers are right."""
        return sum(answer.right for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right, from 0 to 1."""
        return self.num_right / len(self.answers)


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    *,
    make_cache: "Callable[[], Cache] | None" = None,
    chunk_tokens: int | None = None,
    after_prefill: "Callable[[Cache], None] | None" = None,
    cloze: bool = False,
) -> Evaluation:
    """Ask the model all questions of the documents, greedily.

    Args:
        model: The demo model, or another instruction-tuned one; its attention implementation is
            used as it is.
        tokenizer: The model's tokenizer, with a chat template unless `cloze`.
        documents: From `make_document`.
        make_cache: Makes an empty cache for each document; it must be able to `crop`. Default:
            `DynamicCache`.
        chunk_tokens: Prefill in chunks of so many tokens; None for one chunk.
        after_prefill: Called with the cache when a document has been prefilled, for instance to
            damage it.
        cloze: Let the model complete a sentence of the document's form, in place of a chat.

    Raises:
        ValueError: There are no documents.
    """
    from transformers import DynamicCache

    answers: list[Answer] = []
    prompt_tokens, prefill_s, answer_s = 0, [], []
    for document in documents:
        prompts = encode_prompts(tokenizer, document, cloze=cloze)
        prompt_tokens = max(prompt_tokens, *map(len, prompts))
        shared = num_shared_tokens(prompts)
        cache = make_cache() if make_cache else DynamicCache()
        started = time.perf_counter()
        prefill(model, prompts[0][:shared], cache, chunk_tokens=chunk_tokens)
        prefill_s.append(time.perf_counter() - started)
        if after_prefill:
            after_prefill(cache)
        started = time.perf_counter()
        for fact, prompt in zip(document.facts, prompts, strict=True):
            new_ids = continue_greedily(
                model, prompt[shared:], cache, eos_token_id=tokenizer.eos_token_id
            )
            cache.crop(shared - cache.get_seq_length())
            given = str(tokenizer.decode(new_ids, skip_special_tokens=True)).strip()
            question = fact.cloze if cloze else fact.question
            answers.append(Answer(question=question, expected=fact.answer, given=given))
        answer_s.append(time.perf_counter() - started)
    if not answers:
        raise ValueError("no documents to evaluate on; give at least one")
    return Evaluation(
        answers=tuple(answers),
        prompt_tokens=prompt_tokens,
        prefill_s=tuple(prefill_s),
        answer_s=tuple(answer_s),
    )


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", document: Document, *, cloze: bool = False
) -> list[list[int]]:
    """Encode one whole prompt for each fact of the document."""
    if cloze:
        return [
            list(tokenizer(document.message(fact.cloze))["input_ids"]) for fact in document.facts
        ]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": document.message(fact.question)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for fact in document.facts
    ]
    return [list(tokenizer(chat, add_special_tokens=False)["input_ids"]) for chat in chats]


def num_shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all prompts begin; of each prompt at least one token is left."""
    most = min(map(len, prompts)) - 1
    differing = (idx for idx in range(most) if any(ids[idx] != prompts[0][idx] for ids in prompts))
    return next(differing, most)


def prefill(
    model: "PreTrainedModel", ids: Sequence[int], cache: "Cache", *, chunk_tokens: int | None = None
) -> "Tensor":
    """Run the model over the token ids, appending to the cache.

    Args:
        model: Any causal language model.
        ids: Token ids, at least one.
        cache: Holds the tokens before these; updated in place.
        chunk_tokens: Most tokens of one forward pass; None for all.

    Returns:
        Logits of the last token, `[vocab_size]`, on the model's device.
    """
    import torch

    from headinfer.integration.calls import cache_argument

    step = chunk_tokens or len(ids)
    with torch.inference_mode():
        for start in range(0, len(ids), step):
            chunk = torch.tensor([ids[start : start + step]], device=model.device)
            output = model(
                input_ids=chunk, use_cache=True, logits_to_keep=1, **cache_argument(model, cache)
            )
    logits: Tensor = output.logits[0, -1]
    return logits


def continue_greedily(
    model: "PreTrainedModel",
    ids: Sequence[int],
    cache: "Cache",
    *,
    eos_token_id: int,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> list[int]:
    """Continue by these tokens and then by the likeliest ones, up to and without the end token."""
    new_ids: list[int] = []
    logits = prefill(model, ids, cache)
    while len(new_ids) < max_new_tokens:
        token_id = int(logits.argmax())
        if token_id == eos_token_id:
            break
        new_ids.append(token_id)
        logits = prefill(model, [token_id], cache)
    return new_ids
