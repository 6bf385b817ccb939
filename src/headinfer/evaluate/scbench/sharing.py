"""Several questions through one cache: what they share is computed once, and the time measured.

A later question finds tokens in the cache. What they took to compute is the time that it saves.
Both are measured in the same process, by the same method.
"""

from collections.abc import Iterator, Sequence

from headinfer.evaluate.answers.answering import Answerer, cut_middle
from headinfer.evaluate.answers.record import Answer

Told = tuple[Answer, dict[str, float]]
"""An answer, and measures of its record.

`reused_tokens` were computed for an earlier question, in `saved_s`. `context_s` is what the context
took before the first question, where that is measured apart.
"""


def turns(
    answerer: Answerer, prompts: Sequence[list[int]], most: Sequence[int], context_tokens: int
) -> Iterator[Told]:
    """Ask each question after the one before; what the model answered to that is forgotten.

    Args:
        answerer: of the method.
        prompts: token ids of the first turn, and of each later one: the right answer to the turn
            before, and the question.
        most: tokens of the answer to each.
        context_tokens: the most tokens of all turns; the first is cut in the middle.

    Raises:
        OptionError: the later turns leave no room for the first.
    """
    first, *later = prompts
    questions = [(question, 0) for question in later]
    first = cut_middle(first, context_tokens - sum(map(len, later)))
    dialogue = answerer.dialogue(first, [*questions, ([], max(most))])
    computed_s = 0.0
    for number, new_tokens in enumerate(most):
        question = later[number - 1] if number else []
        answer = dialogue.answer(question, new_tokens, forget=True)
        saved_s = computed_s if answer.kept_tokens else 0.0
        yield answer, {"reused_tokens": answer.kept_tokens, "saved_s": saved_s}
        computed_s = saved_s + answer.prefill_s


def requests(
    answerer: Answerer, prompts: Sequence[list[int]], most: Sequence[int], context_tokens: int
) -> Iterator[Told]:
    """Ask each question after the context alone.

    Args:
        answerer: of the method.
        prompts: token ids of the context, and of each question.
        most: tokens of the answer to each.
        context_tokens: the most tokens of the context and a question; the context is cut in the
            middle.

    Raises:
        OptionError: a question leaves no room for the context.
    """
    context, *questions = prompts
    longest = max(questions, key=len)
    context = cut_middle(context, context_tokens - len(longest))
    dialogue = answerer.dialogue(context, [(longest, max(most))])
    context_s = dialogue.read()
    place = dialogue.place(len(longest) + max(most))
    try:
        last = len(questions) - 1
        for number, (question, new_tokens) in enumerate(zip(questions, most, strict=True)):
            answer = dialogue.answer(question, new_tokens)
            reused_tokens = answer.kept_tokens if number else 0
            yield (
                answer,
                {
                    "reused_tokens": reused_tokens,
                    "saved_s": context_s if reused_tokens else 0.0,
                    "context_s": 0.0 if number else context_s,
                },
            )
            if number < last:
                dialogue.go_back(place, again=number + 1 < last)
    finally:
        place.close()
