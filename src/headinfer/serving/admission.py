"""What is refused at once, with the arithmetic: what the model or the memory cannot hold."""

from dataclasses import dataclass

from headinfer.errors import ContextLengthError, MemoryPlanError
from headinfer.generation.settings import DEFAULT_NEW_TOKENS
from headinfer.serving.ask import Ask
from headinfer.session import Session
from headinfer.units import counted, counted_tokens, format_bytes


@dataclass(slots=True, kw_only=True)
class Admission:
    """A judge of what one attached model can answer at all.

    Attributes:
        session: the attachment.
        allow_long: whether prompts may have more tokens than the model was made for.
    """

    session: Session
    allow_long: bool = False
    _planned_tokens: int = 0

    def check(self, ask: Ask, yielding_bytes: int) -> None:
        """Refuse an ask that cannot be answered, whatever else ends before it.

        Args:
            ask: its settings are right.
            yielding_bytes: CPU memory of what yields or ends: kept prefixes and other requests.

        Raises:
            ContextLengthError: the model has no positions for so many tokens.
            MemoryPlanError: the CPU memory or the GPU memory never holds so many.
        """
        prompt_tokens, given = len(ask.ids), ask.given.get("max_new_tokens")
        self._check_positions(prompt_tokens, given)
        tokens = prompt_tokens + (DEFAULT_NEW_TOKENS if given is None else int(given))
        told = f"prompt and answer of {counted(tokens, 'token')} need"
        self._check_host(tokens, yielding_bytes, told)
        if tokens > self._planned_tokens:
            self.session.check_device(tokens)
            self._planned_tokens = tokens

    def check_least(self, prompt_tokens: int, yielding_bytes: int) -> None:
        """Refuse a prompt before it is tokenised.

        Args:
            prompt_tokens: that it has at least.
            yielding_bytes: as for `check`.

        Raises:
            ContextLengthError: the model has no positions for so many tokens.
            MemoryPlanError: the CPU memory never holds so many.
        """
        told, most = counted(prompt_tokens, "token"), self.session.max_positions
        if not self.allow_long and 0 < most <= prompt_tokens:
            raise ContextLengthError(
                f"the prompt has at least {told}, and the model was made for {most:,}; shorten the "
                "prompt"
            )
        self._check_host(prompt_tokens, yielding_bytes, f"a prompt of at least {told} needs")

    def _check_positions(self, prompt_tokens: int, new_tokens: int | None) -> None:
        most = self.session.max_positions
        wanted = prompt_tokens + (1 if new_tokens is None else new_tokens)
        if self.allow_long or not most or wanted <= most:
            return
        room = most - prompt_tokens
        told = f"at most {counted(room, 'new token')} fit" if room > 0 else "shorten the prompt"
        raise ContextLengthError(
            f"the prompt has {counted(prompt_tokens, 'token')} and the answer may have "
            f"{wanted - prompt_tokens:,}, {wanted:,} together, and the model was made for "
            f"{most:,}; {told}"
        )

    def _check_host(self, tokens: int, yielding_bytes: int, what: str) -> None:
        plan = self.session.plan
        needed = plan.kv_host_bytes(tokens)
        room = self.session.host_room(plan.arena_bytes + plan.activation_bytes)
        there = room.kv_bytes + yielding_bytes
        if needed <= there:
            return
        if self.session.disk.file is not None:
            self.session.disk.check(tokens, there)
            return
        raw_bytes, page = plan.raw_page_bytes, plan.shape.host_format.row_tokens
        page_bytes = max(plan.kv_host_bytes(page) - raw_bytes, 1)  # of what grows with the tokens
        fitting = max(there - raw_bytes, 0) // page_bytes * page
        fit = f"{counted_tokens(fitting)} {'fits' if fitting == 1 else 'fit'}"
        raise MemoryPlanError(
            f"{what} {format_bytes(needed)} of CPU memory for the KV cache, and "
            f"{format_bytes(there)} can be had once all else has ended: {fit}. GPU memory would "
            f"take {format_bytes(plan.total_device_bytes)}. Shorten the prompt, ask for fewer new "
            "tokens, or free CPU memory"
        )
