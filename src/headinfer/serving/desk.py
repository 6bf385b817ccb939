"""The desk: where several clients of one model ask, wait and are served."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from transformers import PreTrainedModel

from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.generation.least_tokens import LeastTokens
from headinfer.integration.attachment import owner_of
from headinfer.integration.saving import SavedSession
from headinfer.saved.messages import Messages
from headinfer.serving.admission import Admission
from headinfer.serving.ask import Ask
from headinfer.serving.events import Ended, Event
from headinfer.serving.prefix_folder import PrefixFolder
from headinfer.serving.prefixes import Prefixes
from headinfer.serving.queueing import Line
from headinfer.serving.request import Request, Served
from headinfer.serving.sessions import NamedSession, RestoredSession, Sessions
from headinfer.serving.slots import SlotState
from headinfer.session import Session
from headinfer.units import parse_bytes

_logger = logging.getLogger(__name__)

_KEPT_DIVISOR = 2
"""Kept prefixes may take one in so many bytes of the CPU memory that KV caches can have."""

_MOST_ID = 100

_GROW_BYTES = 4 * 2**30
"""A prompt is saved while it is read, whenever so much is new: at most that is lost to a crash."""


class Ticket(Protocol):
    """A claim on the answer to a request."""

    @property
    def id(self) -> str:
        """A name that no other request has."""

    def cancel(self) -> None:
        """Have the request end between two tokens or chunks; what was read stays kept."""

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        """Block until it has ended, and return how; None where that takes longer."""


def _kept_bytes(given: str | int, session: Session) -> int:
    """Return the most CPU memory of kept prefixes."""
    if given == "auto":
        return session.host_room(session.plan.activation_bytes).kv_bytes // _KEPT_DIVISOR
    return parse_bytes(given, "kept_memory")


def _keep_experts(model: Any) -> Callable[[], object]:
    """Have `generate` leave a model's experts as they compute; return what undoes that.

    On GPUs it has them compute otherwise while a request decodes. The prompts of others would then
    copy the weights of the experts for each token.
    """
    name = "_optimize_model_for_decode"
    if not hasattr(model, name):
        return lambda: None
    model.__dict__[name] = contextlib.nullcontext
    return lambda: model.__dict__.pop(name, None)


class Desk:
    """A desk in front of one attached model: it takes requests of several clients.

    Each request has a thread and a cache of its own. The threads take turns after each chunk or
    step. The model is not to be used beside the desk.

    Args:
        model: attached (`headinfer.attach`), on its own in this process.
        tokenizer: its.
        running: requests that run at once.
        waiting: requests that may wait beside them.
        kept_memory: the most CPU memory of kept prefixes, such as "64GiB"; "auto" for a share of
            what is free now.
        session_folder: where prefixes go that there is no memory for, and those that are kept at
            the end; None to drop them.
        session_folder_size: the most disk space of that folder, such as "500GiB"; None for any.
            The prefixes that were used least recently go. Sessions that users named stay.
        allow_long_prompts: whether to take more tokens than the model's positions were made for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        running: int = 4,
        waiting: int = 64,
        kept_memory: str | int = "auto",
        session_folder: str | os.PathLike[str] | None = None,
        session_folder_size: str | int | None = None,
        allow_long_prompts: bool = False,
    ) -> None:
        session = owner_of(model)
        if not isinstance(session, Session):
            raise UnsupportedModelError("the model is not attached; call headinfer.attach first")
        for name, value, least in (("running", running, 1), ("waiting", waiting, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be at least {least}, not {value!r}")
        kept_bytes = _kept_bytes(kept_memory, session)
        folder_bytes = None
        if session_folder_size is not None:
            folder_bytes = parse_bytes(session_folder_size, "session_folder_size")
        folder = None if session_folder is None else PrefixFolder(session_folder, session)
        self._served = Served(
            model=model,
            tokenizer=tokenizer,
            session=session,
            prefixes=Prefixes(session, kept_bytes, folder, _GROW_BYTES, folder_bytes),
            line=Line(running, waiting),
        )
        self._admission = Admission(session=session, allow_long=allow_long_prompts)
        self._least_tokens = LeastTokens(tokenizer)
        self._mutex = threading.Lock()
        self._requests: dict[str, Request] = {}
        self._leave_experts = _keep_experts(model)
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])

    @property
    def uses_marks(self) -> bool:
        """Whether `Ask.marks` are of use: the model cannot go back, and prefixes are kept."""
        return self._served.prefixes.uses_marks

    def check(self, ask: Ask) -> None:
        """Refuse what cannot be answered, before anything is computed.

        Raises:
            OptionError: a setting or a token is wrong, or the prompt is too long for the model.
            MemoryPlanError: the CPU memory or the GPU memory is too small, also once all other
                requests have ended and all kept prefixes yielded; with the arithmetic.
        """
        ask.check(self._vocabulary)
        self._admission.check(ask, self._served.prefixes.yielding_bytes)

    def check_text(self, text: str) -> None:
        """Refuse a prompt whose length in bytes tells that it cannot be answered, whatever it says.

        Args:
            text: to be tokenised. One that is not refused may still be too long.

        Raises:
            ContextLengthError: the prompt is too long for the model.
            MemoryPlanError: the CPU memory is too small, as in `check`.
        """
        if tokens := self._least_tokens.of(text):
            self._admission.check_least(tokens, self._served.prefixes.yielding_bytes)

    def submit(self, ask: Ask, on_event: Callable[[Event], None]) -> Ticket:
        """Have a request begin, or wait in the queue.

        Args:
            ask: what is asked; it is checked here, too.
            on_event: told what happens, from the request's own thread, one event at a time. The
                last is `Ended`. One that raises cancels the request. One that blocks may block all
                requests, as some events come in the middle of a call of the model.

        Raises:
            QueueFullError: as many wait as may.
            DeskClosedError: the desk was closed.
            HeadInferError: as `check` does.
        """
        self.check(ask)
        request = Request(self._served, ask, on_event, self._forget)
        with self._mutex:
            self._served.line.enter(request)
            self._requests[request.id] = request
            request.start()
        return request

    def _forget(self, request_id: str) -> None:
        with self._mutex:
            self._requests.pop(request_id, None)

    def slots(self) -> list[SlotState]:
        """Return what each request and each kept prefix holds, without waiting for any."""
        with self._mutex:
            requests = list(self._requests.values())
        return [*(request.state for request in requests), *self._served.prefixes.states()]

    def save_slot(self, slot_id: str, name: str, messages: Messages | None = None) -> SavedSession:
        """Save what a request or a kept prefix holds as a session of the session folder.

        Args:
            slot_id: as `slots` and `Ended` tell it.
            name: of the session; one that is there is replaced.
            messages: of the conversation that the slot has read.

        Raises:
            OptionError: there is no such slot, no folder, or it is no name.
            SessionFileError: it cannot be saved; what was there is whole.
        """
        sessions = self._sessions()
        with self._mutex:
            request = self._requests.get(slot_id)
        cache = None if request is None else request.fork()
        cache = cache or sessions.fork(slot_id)
        if cache is None:
            raise OptionError(
                f"there is no slot {slot_id[:_MOST_ID]!r} that holds anything; GET /slots lists all"
            )
        return sessions.save(cache, name, messages)

    def restore_slot(self, name: str) -> RestoredSession:
        """Have a session of the session folder as a kept prefix, in memory.

        Raises:
            OptionError: there is no folder, or it is no name.
            SessionFileError: there is no such session, or it is of another model.
            MemoryPlanError: it does not fit.
        """
        return self._sessions().restore(name)

    def sessions(self) -> list[NamedSession] | None:
        """Return the sessions that can be restored, the newest first; None without a folder."""
        sessions = self._served.prefixes.sessions
        return None if sessions is None else sessions.listed()

    def _sessions(self) -> Sessions:
        sessions = self._served.prefixes.sessions
        if sessions is None:
            raise OptionError(
                "no sessions are kept here; start the server with --session-folder FOLDER, and with"
                " a model whose prefixes can be kept"
            )
        return sessions

    def close(self, *, timeout_s: float) -> bool:
        """Cancel what runs, save kept prefixes to the session folder, and detach the model.

        May be called again.

        Args:
            timeout_s: the most seconds for all that. What still runs then is left alone, with the
                model attached, and the log says so.

        Returns:
            Whether all has ended. A thread that is left may be in a call of the model.
        """
        began_s = time.monotonic()
        self._served.line.close()
        with self._mutex:
            requests = list(self._requests.values())
        for request in requests:
            request.cancel()
        until_s = began_s + timeout_s
        late = _late(requests, began_s + timeout_s / 2)  # the other half is for what is kept
        closed = self._close_prefixes(until_s)
        if late and closed:
            waited, late = late, _late(late, until_s)
            if len(late) < len(waited):  # what they read is kept since, too
                closed = self._close_prefixes(until_s)
        if late or not closed:
            _logger.warning(
                "not all ended in %.0f s, requests that still run: %d; what they read last is not "
                "kept, and the model stays attached",
                timeout_s,
                len(late),
            )
            return False
        self._leave_experts()
        self._served.session.detach()
        return True

    def _close_prefixes(self, until_s: float) -> bool:
        """Save and drop kept prefixes; return whether that is done in time."""
        left_s = max(until_s - time.monotonic(), 0)
        # In a thread, because caches wait for the turn of a request that does not end.
        closing = threading.Thread(
            target=self._served.prefixes.close,
            args=(left_s,),
            name="headinfer-closing",
            daemon=True,
        )
        closing.start()
        closing.join(left_s)
        return not closing.is_alive()


def _late(requests: list[Request], until_s: float) -> list[Request]:
    """Wait for requests until then, and return those that still run."""
    return [each for each in requests if each.wait(max(until_s - time.monotonic(), 0)) is None]
