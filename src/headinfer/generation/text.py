"""Text as it comes: token ids in, whole characters out.

What was written in all is exactly the text of all tokens decoded together. Nothing is held back
until the next space. Both are unlike transformers' own `TextStreamer`.
"""

from collections.abc import Callable
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextCollector:
    """A streamer for `generate` with one row: has its `put` and `end`.

    Args:
        tokenizer: of transformers.
        write: given each new piece of text, never empty.
        check: called before new tokens are taken; may raise.

    Attributes:
        ids: the new tokens, special ones included.
        text: all that was written.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._write = write
        self._check = check
        self._prompt_is_next = True
        self._window_start = 0
        self._written_ids = 0

    def put(self, value: Any) -> None:
        """Take token ids; those of the first call are the prompt, and left out."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._check()
        self.add(value.flatten().tolist())

    def add(self, ids: list[int]) -> None:
        """Take new token ids and write what they complete.

        A token's text depends on the token before it (spaces, characters of several tokens). So the
        tokens written last are decoded once more together with the new ones.
        """
        self.ids += ids
        before = self._decode(self._window_start, self._written_ids)
        after = self._decode(self._window_start, len(self.ids))
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            self._window_start, self._written_ids = self._written_ids, len(self.ids)
            self._emit(after[len(before) :])

    def end(self) -> None:
        """Write what was held back; may be called again."""
        whole = self._decode(0, len(self.ids))
        if whole.startswith(self.text):
            self._emit(whole[len(self.text) :])

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _emit(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._write(piece)
