"""An answerer that says what a test wants, and a tokenizer of one token a letter."""

from collections.abc import Sequence
from dataclasses import replace

from answers_parts import answer

from saved_models import CHAT_TEMPLATE


class Letters:
    """A tokenizer whose tokens are the letters of a text."""

    def __init__(self, chat_template: str | None = CHAT_TEMPLATE) -> None:
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [list(map(ord, each)) for each in text]}
        return {"input_ids": list(map(ord, text))}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(map(chr, tokens))

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize
        tags = {"user": "<user>", "assistant": "<assistant>"}
        said = "".join(f"{tags[each['role']]} {each['content']} " for each in messages)
        return f"{said}<assistant>" if add_generation_prompt else said


def letters_tokenizer(**changes) -> Letters:
    return Letters(**changes)


class Said:
    """An answerer that gives texts in turn, and keeps what it was asked."""

    def __init__(self, texts: Sequence[str], **changes) -> None:
        self.tokenizer = letters_tokenizer(**changes)
        self._texts = list(texts)
        self.prompts: list[list[int]] = []
        self.most: list[int] = []

    def texts(self) -> list[str]:
        return [self.tokenizer.decode(prompt) for prompt in self.prompts]

    def answer(self, prompt, max_new_tokens, stop=()):
        self.prompts.append(list(prompt))
        self.most.append(max_new_tokens)
        return replace(answer(), text=self._texts.pop(0))
