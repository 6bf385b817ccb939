"""Samples of RULER's tasks, each drawn by its own name, so that any can be made alone."""

import contextlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.ruler.files import essay_sentences, questions
from headinfer.evaluate.ruler.fit import most_units
from headinfer.evaluate.ruler.kinds import KINDS
from headinfer.evaluate.ruler.needles import FORMS, hide
from headinfer.evaluate.ruler.seeds import seeded
from headinfer.units import counted_tokens


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as the harness's tasks read it.

    Attributes:
        input: the prompt without template and beginning of the answer.
        outputs: right answers.
        gen_prefix: the beginning of the answer.
    """

    input: str
    outputs: list[str]
    gen_prefix: str


class Maker:
    """A maker of samples of one task, with prompt and answer of at most `context_tokens`.

    Args:
        kind: name of the task.
        context_tokens: the length, as RULER counts it: without a chat template.
        tokenizer: of transformers.
        seed: of all samples.
        folder: with the files that the task needs.
    """

    def __init__(
        self,
        kind: str,
        context_tokens: int,
        tokenizer: Any,
        *,
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        self._kind = kind
        self._context_tokens = context_tokens
        self._tokenizer = tokenizer
        self._name = f"{kind}/{context_tokens}/{seed}"
        self._folder = folder
        self._new_tokens = KINDS[kind].new_tokens
        make = _MAKERS.get(kind, _needles)
        with seeded(f"{self._name}/length"):
            try:
                self._draw = make(self)
            except OptionError as error:
                raise OptionError(
                    f"{kind} does not fit into {counted_tokens(context_tokens)}: {error}; "
                    "give larger --contexts"
                ) from error

    def sample(self, number: int) -> Sample:
        """Return the sample of a number."""
        with seeded(f"{self._name}/{number}") as drawn:
            return self._draw(number, drawn)

    def tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    @property
    def room(self) -> int:
        """The most tokens of a prompt."""
        return self._context_tokens - self._new_tokens

    def shortened(
        self, units: int, step: int, draw: Callable[[int], tuple[str, Sample]], least: int = 1
    ) -> Sample:
        """Draw a sample, and again a shorter one as long as it has too many tokens.

        Args:
            units: of the first try.
            step: by which it gets shorter.
            draw: returns all text that counts, and the sample, for some units.
            least: the fewest units.

        Raises:
            OptionError: none is short enough.
        """
        for fewer in (*range(max(units, least), least, -step), least):
            text, sample = draw(fewer)
            if self.tokens(text) <= self.room:
                return sample
        raise OptionError(
            f"{self._kind} does not fit into {counted_tokens(self._context_tokens)}; give "
            "larger --contexts"
        )


_Draw = Callable[[int, random.Random], Sample]


def _needles(maker: Maker) -> _Draw:
    form = FORMS[maker._kind]
    essay = None
    if form.haystack == "essay":
        assert maker._folder is not None
        essay = essay_sentences(maker._folder)

    def draw(units: int, drawn: random.Random) -> tuple[str, Sample]:
        hidden = hide(form, max(units, form.needles), drawn, essay=essay)
        return hidden.text, Sample(hidden.text, hidden.answers, hidden.prefix)

    def tokens_of(units: int) -> int:
        text, sample = draw(units, random.Random(maker._name))
        return maker.tokens(text + " ".join(sample.outputs))

    step = form.step(maker._context_tokens)
    units = most_units(tokens_of, maker.room, step)
    return lambda _, drawn: maker.shortened(
        units, step, lambda fewer: draw(fewer, drawn), form.needles
    )


def _tracking(maker: Maker) -> _Draw:
    """Chains of variables; an example of its own, with other names, comes first."""
    from lm_eval.tasks.ruler import vt_utils

    chains, hops, step = 1, 4, 10
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its lengths
        (example,) = vt_utils.sys_vartrack_w_noise_random(
            maker._tokenizer, num_samples=1, max_seq_length=500, incremental=5
        )
    shown = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    shown_tokens = maker.tokens(shown)

    def tokens_of(units: int) -> int:
        text, answers = vt_utils.generate_input_output(units, chains, hops)
        return maker.tokens(f"{text} {answers}") + shown_tokens

    def draw(units: int) -> tuple[str, Sample]:
        text, answers = vt_utils.generate_input_output(units, chains, hops)
        return shown + text, tracked(shown, text, answers)

    units = most_units(tokens_of, maker.room, step)
    return lambda _number, _drawn: maker.shortened(units, step, draw)


def tracked(shown: str, text: str, answers: list[str]) -> Sample:
    """Return a sample of variables: the example with new names, then the text.

    Args:
        shown: the example.
        text: with the beginning of the answer at its end.
        answers: names of variables.
    """
    from lm_eval.tasks.ruler import vt_utils

    begins = text.rfind(" Answer: According to the chain(s) of variable assignment")
    return Sample(
        input=f"{vt_utils.randomize_icl(shown)}\n\n{text[:begins]}",
        outputs=answers,
        gen_prefix=text[begins:].strip(),
    )


def _common_words(maker: Maker) -> _Draw:
    """Words, of which ten come ten times as often; where all words are used, each comes oftener."""
    from lm_eval.tasks.ruler import cwe_utils

    step, last = 10, len(cwe_utils.WORDS)
    often = 1

    def made(units: int) -> tuple[str, str, list[str]]:
        example, text, answers = cwe_utils.generate_input_output(
            units, maker._context_tokens, freq_cw=30 * often, freq_ucw=3 * often
        )
        return example, text, answers

    def tokens_of(units: int) -> int:
        example, text, answers = made(units)
        said = " ".join(f"{place + 1}. {word}" for place, word in enumerate(answers))
        return maker.tokens(f"{example}\n{text} {said}")

    def draw(units: int, drawn: random.Random) -> tuple[str, Sample]:
        _, text, answers = made(units)
        prefix = cwe_utils.CONFIG["answer_prefix"]
        return text, Sample(text[: text.rfind(prefix)].strip(), answers, prefix.strip())

    def sample(_number: int, drawn: random.Random) -> Sample:
        cwe_utils.RNG.seed(drawn.getrandbits(64))
        return maker.shortened(units, step, lambda fewer: draw(fewer, drawn), step)

    cwe_utils.RNG.seed(0)
    units = most_units(tokens_of, maker.room, step, last)
    if units > last - step:
        often = max(1, -(-maker.room // tokens_of(units)))
        units = most_units(tokens_of, maker.room, step, last)
    return sample


def _frequent_words(maker: Maker) -> _Draw:
    """Coded words, three of which are the most frequent."""
    from lm_eval.tasks.ruler import fwe_utils

    most = maker._context_tokens  # without the answer, as the harness counts here
    keywords = {"vocab_size": most // 50, "incremental": most // 32}
    if keywords["vocab_size"] < 4:
        raise OptionError("three words are asked for, beside those that are noise")
    _, _, words = fwe_utils.generate_input_output(most, maker._tokenizer, **keywords)

    def sample(_number: int, _drawn: random.Random) -> Sample:
        text, answers, _ = fwe_utils.generate_input_output(
            most, maker._tokenizer, num_words=words, **keywords
        )
        prefix = fwe_utils.CONFIG["answer_prefix"]
        return Sample(text[: text.rfind(prefix)].strip(), answers, prefix.strip())

    return sample


def _questions(maker: Maker) -> _Draw:
    """Documents, with those that answer a question among them."""
    from lm_eval.tasks.ruler import qa_utils

    source = KINDS[maker._kind].source
    assert source is not None
    assert maker._folder is not None
    asked, documents = questions(maker._folder, source)
    step = 10

    def made(number: int, units: int) -> tuple[str, list[str]]:
        text, answers = qa_utils.generate_input_output(number, units, qas=asked, docs=documents)
        return text, answers

    def tokens_of(units: int) -> int:
        text, answers = made(0, units)
        return maker.tokens(f"{text} {answers}")

    def draw(number: int, units: int) -> tuple[str, Sample]:
        text, answers = made(number, units)
        return text, Sample(text, answers, qa_utils.CONFIG["answer_prefix"])

    try:
        units = most_units(tokens_of, maker.room, step, len(documents))
    except OptionError:
        units = 1  # fewer than a step; each sample looks for itself

    def sample(number: int, _drawn: random.Random) -> Sample:
        number %= len(asked)
        least = len(asked[number]["context"])
        return maker.shortened(units, step, lambda fewer: draw(number, fewer), least)

    return sample


_MAKERS: dict[str, Callable[[Maker], _Draw]] = {
    "ruler_vt": _tracking,
    "ruler_cwe": _common_words,
    "ruler_fwe": _frequent_words,
    "ruler_qa_squad": _questions,
    "ruler_qa_hotpot": _questions,
}
