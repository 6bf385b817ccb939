"""Text as it comes: token ids in, whole characters out.

What was written in all is exactly the text of all tokens decoded together. Nothing is held back
until the next space. Both are unlike transformers' own `TextStreamer`. Where strings are to end the
text, what may be the beginning of one is held back.
"""

from collections.abc import Callable, Sequence
from typing import Any

from headinfer.generation.stops import Stops

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextCollector:
    """A streamer for `generate` with one row: has its `put` and `end`.

    Args:
        tokenizer: of transformers.
        write: given each new piece of text, never empty.
        check: called before new tokens are taken; may raise.
        stops: what ends the text; no token is taken after it.

    Attributes:
        ids: the new tokens, special ones included.
        text: all that was written.
        stop: the stop that came; None while none did.
    """

    def __init__(
        self,
        tokenizer: Any,
        write: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
        *,
        stops: Stops | None = None,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.stop: str | None = None
        self._held = ""
        self._stops = stops or Stops()
        self._tokenizer = tokenizer
        self._write = write
        self._check = check
        self._prompt_is_next = True
        self._window_start = 0
        self._written_ids = 0

    @property
    def stopped(self) -> bool:
        """Whether one of the stops came."""
        return self.stop is not None

    def put(self, value: Any) -> None:
        """Take token ids; those of the first call are the prompt, and left out."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._check()
        self.add(value.flatten().tolist())

    def add(self, ids: Sequence[int]) -> None:
        """Take new token ids and write what they complete."""
        if not self._stops:
            self._take(list(ids))
            return
        for token_id in ids:
            if self.stopped:
                return
            self._take([token_id])
            if (stop := self._stops.special.get(token_id)) is not None:
                self.end()
                self.stop = stop

    def end(self) -> None:
        """Write what was held back; may be called again."""
        if self.stopped:
            return
        whole, known = self._decode(0, len(self.ids)), self.text + self._held
        rest = whole[len(known) :] if whole.startswith(known) else ""
        self._emit(rest, ended=True)

    def _take(self, ids: list[int]) -> None:
        """Take token ids.

        A token's text depends on the token before it (spaces, characters of several tokens). So the
        tokens written last are decoded once more together with the new ones.
        """
        self.ids += ids
        before = self._decode(self._window_start, self._written_ids)
        after = self._decode(self._window_start, len(self.ids))
        if len(after) > len(before) and not after.endswith(_INCOMPLETE):
            self._window_start, self._written_ids = self._written_ids, len(self.ids)
            self._emit(after[len(before) :])

    def _decode(self, start: int, end: int) -> str:
        return str(
            self._tokenizer.decode(
                self.ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _emit(self, piece: str, *, ended: bool = False) -> None:
        """Write what cannot be the beginning of a stop, or all of it where the text has ended."""
        piece = self._held + piece
        found = self._stops.find(piece)
        if found is None:
            cut = len(piece) - (0 if ended else self._stops.held_chars(piece))
            self._held = piece[cut:]
        else:
            self._held, (cut, self.stop) = "", found
        if cut:
            self.text += piece[:cut]
            self._write(piece[:cut])
