"""Logits that are no numbers end an answer; left alone they would become token 0, or any other."""

from typing import Any

from headinfer.errors import NotANumberError
from headinfer.integration.watchers import Watcher


class LogitsCheck(Watcher):
    """A check that a model's logits are numbers; it raises before a token is made of others.

    The note is made on the model's device and read where `generate` waits for the device anyway,
    so that no wait is added. The logits are the model's own: what makes scores of them may well
    leave infinity.

    Args:
        dtype: the model's, for the message.
    """

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._calls = 0
        self._unread: list[Any] = []

    def end(self, output: Any) -> None:
        """Take note of the logits of a call."""
        logits = output.logits
        # The largest is NaN if any is, and minus infinity if all are.
        finite = logits.amax(dim=-1, keepdim=True).isfinite()
        self._unread.append(finite.all())
        self._calls += 1
        logits.masked_fill_(~finite, 0)  # sampling from NaN would end a CUDA context

    def raise_if_noted(self, written_tokens: int | None = None) -> None:
        """Read the notes; called before a token is written.

        Args:
            written_tokens: tokens of the answer so far; None where each pass gives one.

        Raises:
            NotANumberError: logits were NaN, or the largest was infinite.
        """
        unread, self._unread = self._unread, []
        if not all(unread):
            new_token = self._calls if written_tokens is None else written_tokens + 1
            raise NotANumberError(self._message(new_token))

    def _message(self, new_token: int) -> str:
        what = f"the model's logits for new token {new_token} are NaN or infinite"
        if self._dtype == "float32":
            return f"{what}; most likely its weights are damaged: fetch them again"
        others = "float32" if self._dtype == "bfloat16" else "bfloat16 or float32"
        return (
            f"{what}; most likely numbers overflow in {self._dtype} or the weights are damaged: "
            f"try dtype={others}"
        )
