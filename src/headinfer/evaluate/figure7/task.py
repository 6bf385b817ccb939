"""A sentence off the theme of a document, as in Figure 7 of the paper.

What has to do with the theme is attended again and again, and the sentence never. Methods that drop
tokens are said to lose it: H2O for it is attended little, StreamingLLM for it is far back.

The paper takes a document of LongBench. Here it is a stretch of one book, or any text. The embedded
model has its chronicle, and a sentence of the one kind that it can be asked about.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.demo import words
from headinfer.demo.document import make_prose
from headinfer.demo.prose import CLOZE, FACTS, QUESTION
from headinfer.evaluate.answers.record import Record
from headinfer.evaluate.figure7.sentences import SENTENCES
from headinfer.evaluate.needle.hiding import Hidden, Hiding
from headinfer.evaluate.prompts.haystack import PROSE_PACKAGE, Haystack, prose
from headinfer.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure7(Hiding):
    """A task of sentences off the theme: another one for each sample.

    Attributes:
        is_demo: whether they are for the embedded model.
        name: of the verb.
    """

    is_demo: bool = False
    name: str = "figure7"

    def haystack(self, tokenizer: Any, context_tokens: int) -> Haystack:
        """Return the document."""
        made_up = self.is_demo and self.text is None
        text = make_prose(context_tokens, self.seed) if made_up else prose(self.text)
        return Haystack(text, tokenizer)

    def hidden(self, drawn: random.Random, sample: int) -> Hidden:
        """Return a sentence, which nothing before it tells of."""
        if self.is_demo:
            return _of_the_demo(drawn, raw=self.raw)
        sentence = SENTENCES[(self.seed + sample) % len(SENTENCES)]
        end = sentence.drawn_end(drawn)
        return Hidden(
            sentence=f" {sentence.begun} {end}.",
            message=("", f"\n\n{sentence.question}"),
            begun=sentence.begun,
            answer=end,
            labels={"asked": sentence.question},
        )

    def told(self) -> list[str]:
        """Return what the document is."""
        made_up = "the embedded model's chronicle" if self.is_demo else PROSE_PACKAGE
        return [f"a sentence off the theme of {self.text or made_up}"]

    def remarks(self, records: Sequence[Record]) -> list[str]:
        """Return how many sentences were found, and what was said of the first one lost."""
        if not records:
            return []
        lost = [record for record in records if not record.score]
        told = f"found {len(records) - len(lost)} of {counted(len(records), 'sentence')}"
        if lost:
            first = lost[0]
            asked, said = first.labels["asked"], first.answer.text.strip()
            told += (
                f"; lost one at depth {first.labels['depth']:g}: {asked} "
                f'"{said}", and not "{first.expected[0]}"'
            )
        return [told]


def _of_the_demo(drawn: random.Random, *, raw: bool) -> Hidden:
    """Return a sentence of the only kind that the embedded model can be asked about."""
    adjective, noun = drawn.choice(words.ADJECTIVES), drawn.choice(words.NOUNS)
    number = f"{drawn.randrange(100):02d}-{drawn.randrange(100):02d}"
    question = QUESTION.format(adjective=adjective, noun=noun)
    cloze = CLOZE.format(adjective=adjective, noun=noun)
    return Hidden(
        sentence=" " + FACTS[0].format(adjective=adjective, noun=noun, number=number),
        message=("", "" if raw else f"\n\n{question}"),
        begun=cloze if raw else "",  # a chat's answer begins with the number
        answer=number,
        labels={"asked": question},
    )
