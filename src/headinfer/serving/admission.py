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
        self._check_host(tokens, yielding_bytes)
        if tokens > self._planned_tokens:
            self.session.check_device(tokens)
            self._planned_tokens = tokens

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

    def _check_host(self, tokens: int, yielding_bytes: int) -> None:
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
            f"prompt and answer of {counted(tokens, 'token')} need {format_bytes(needed)} of CPU "
            f"memory for the KV cache, and {format_bytes(there)} can be had once all else has "
            f"ended: {fit}. GPU memory would take {format_bytes(plan.total_device_bytes)}. Shorten "
            "the prompt, ask for fewer new tokens, or free CPU memory"
        )
