"""A tokenizer and an answerer small enough to look at prompts, and prose to hide sentences in."""

import re

from headinfer.evaluate.answers.record import Answer

PROSE = " ".join(
    f"Sentence {number} tells of {'very ' * (number % 7)}little." for number in range(200)
)


class Spaces:
    """A tokenizer of a token for each piece that begins with a space, and for each digit."""

    def __init__(self, chat: bool = False) -> None:
        self.chat_template = "there is one" if chat else None
        self.pieces: list[str] = []
        self.read = 0

    def __call__(self, text, add_special_tokens=True):
        if not isinstance(text, str):
            return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
        self.read += 1
        pieces = ["<s>"] * add_special_tokens + re.findall(r" ?\d| ?[^ \d]+| ", text)
        self.pieces += pieces
        return {"input_ids": list(range(len(self.pieces) - len(pieces), len(self.pieces)))}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return f"<user>{messages[0]['content']}<assistant>"

    def text(self, ids) -> str:
        return "".join(self.pieces[each] for each in ids)


class Reading:
    """An answerer that keeps prompts and says what it is to say."""

    def __init__(self, says=lambda prompt: "", chat=False) -> None:
        self.tokenizer = Spaces(chat)
        self.prompts: list[str] = []
        self.lengths: list[int] = []
        self._says = says

    def answer(self, prompt, max_new_tokens, stop=()):
        self.prompts.append(self.tokenizer.text(prompt))
        self.lengths.append(len(prompt))
        return Answer(
            text=self._says(self.prompts[-1]),
            tokens=(1,),
            ties=(False,),
            prompt_tokens=len(prompt),
            read_tokens=len(prompt),
            prefill_s=1.0,
            decode_s=0.0,
        )
