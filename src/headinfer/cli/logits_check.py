"""Logits that are no numbers end an answer; left alone they would become token 0, or any other."""

from typing import Any

from headinfer.errors import NotANumberError


class LogitsCheck:
    """A logits processor that notes whether logits are numbers, and what raises if they are not.

    The note is made on the model's device and read where `generate` waits for the device anyway,
    so that no wait is added.

    Args:
        prompt_tokens: of the prompt.
        dtype: the model's, for the message.
    """

    def __init__(self, prompt_tokens: int, dtype: str) -> None:
        self._prompt_tokens = prompt_tokens
        self._dtype = dtype
        self._unread: list[tuple[int, Any]] = []

    def note(self, input_ids: Any, scores: Any) -> Any:
        """Take note of a step's scores, `[rows, vocabulary]`; called by `generate`.

        Returns:
            The scores, and zeros for rows without numbers: sampling from NaN ends a CUDA context.
        """
        # The largest is NaN if any is, and minus infinity if all are.
        finite = scores.amax(dim=-1, keepdim=True).isfinite()
        self._unread.append((input_ids.shape[1] - self._prompt_tokens + 1, finite.all()))
        return scores.where(finite, 0)

    def raise_if_noted(self) -> None:
        """Read the notes; called before a token is written.

        Raises:
            NotANumberError: logits were NaN, or the largest was infinite.
        """
        unread, self._unread = self._unread, []
        for new_token, finite in unread:
            if not finite:
                raise NotANumberError(self._message(new_token))

    def criterion(self, input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
        """Read the notes as a stopping criterion that stops nothing; `[rows]` of bool."""
        import torch  # late, so that `--help` answers at once

        self.raise_if_noted()
        return input_ids.new_zeros(input_ids.shape[0], dtype=torch.bool)

    def _message(self, new_token: int) -> str:
        what = f"the model's logits for new token {new_token} are NaN or infinite"
        if self._dtype == "float32":
            return f"{what}; most likely its weights are damaged: fetch them again"
        others = "float32" if self._dtype == "bfloat16" else "bfloat16 or float32"
        return (
            f"{what}; most likely numbers overflow in {self._dtype} or the weights are damaged: "
            f"try --dtype {others}"
        )
