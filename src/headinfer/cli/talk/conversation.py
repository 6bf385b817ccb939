"""A conversation with one model: its messages, its cache, and what the last answer took."""

import operator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from headinfer.cli.answer import Answer, Request
from headinfer.cli.interrupt import Interrupt, Stopped
from headinfer.cli.progress import PrefillBar
from headinfer.cli.session_options import check_room, check_sessions, save_at_the_end, save_session
from headinfer.cli.stages import Stages
from headinfer.cli.talk.messages import check_template, encode_messages
from headinfer.errors import CacheStateError, OptionError, SessionRoomError
from headinfer.generation.settings import Settings, settle
from headinfer.saved.messages import Messages
from headinfer.units import counted, counted_tokens

if TYPE_CHECKING:
    from headinfer.engine.stats import Stats
    from headinfer.offload import Offload

SAVE_ELSEWHERE = "/save FOLDER saves it elsewhere"

_PEAKS = ("peak_device_kv_bytes", "host_kv_bytes", "standard_kv_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Talker:
    """A model that was loaded and attached, with what the user asked of it.

    Attributes:
        request: what was asked.
        console: on stderr.
        model: attached.
        tokenizer: its.
        offload: the attachment.
        positions: that the model was made for; 0 where that is not known.
    """

    request: Request
    console: Console
    model: Any
    tokenizer: Any
    offload: "Offload"
    positions: int

    def settings(self, prompt_tokens: int) -> Settings:
        """Return the settings of an answer, which has one row: the cache is of one."""
        given = self.request.generation.keywords() | {"num_beams": 1}
        return settle(given, self.model.generation_config, prompt_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A record of one answer.

    Attributes:
        prompt_tokens: of the whole conversation before it.
        kept_tokens: of those, the ones that the cache had.
        read_tokens: of the others, those that were read; fewer than all where Ctrl-C stopped that.
        new_tokens: of the answer.
        stats: of this answer alone, but for peaks.
    """

    prompt_tokens: int
    kept_tokens: int
    read_tokens: int
    new_tokens: int
    stats: "Stats"


class Conversation:
    """A conversation, with one cache for all of it.

    Args:
        talker: the model.

    Attributes:
        messages: what was said.
        files: names and texts that come before the next message.
        last: the last answer; None before the first.
        saved: the messages that were saved last; None before the first time.
    """

    def __init__(self, talker: Talker) -> None:
        self.messages = Messages()
        self.files: list[tuple[str, str]] = []
        self.last: Reply | None = None
        self.saved: Messages | None = None
        self._told_of_room = False
        self._talker = talker
        self._seed = talker.request.seed
        self._cache = talker.offload.new_cache()
        self.set_system(talker.request.system)

    @property
    def held_tokens(self) -> int:
        """Tokens that the cache holds."""
        return self._cache.get_seq_length() if self._is_whole() else 0

    def set_system(self, text: str | None) -> None:
        """Have the system say something, or nothing; all is read again then.

        Raises:
            OptionError: the model's chat template does not take it; nothing has changed.
        """
        request = self._talker.request
        if not request.raw:
            check_template(self._talker.tokenizer, text, request.template_values)
        elif text is not None:
            raise OptionError(
                "what the system says is for the chat template, which --raw leaves out"
            )
        self.messages = replace(self.messages, system=text)

    def clear(self) -> None:
        """Forget what was said, files included; the system goes on to say what it says."""
        self.messages = Messages(system=self.messages.system)
        self.files, self.last = [], None
        self._begin_anew()

    def say(self, text: str) -> Stopped | None:
        """Answer a message, and write the answer to stdout as it comes.

        The message and what was said in answer stay, however that ended. Where nothing was said
        the message is forgotten. What was read of it stays in the cache.

        Args:
            text: of the message, before which the files come.

        Returns:
            The signal that ended the answer early, if one did.

        Raises:
            Exception: what it failed with.
            typer.Exit: nobody reads the answer.
        """
        if not self._is_whole():
            self._begin_anew()
        whole = "\n\n".join(filter(None, ["\n".join(text for _, text in self.files), text]))
        asked = self.messages.with_next(whole)
        request = self._talker.request
        ids = encode_messages(
            self._talker.tokenizer, asked, request.template_values, raw=request.raw
        )
        self._check_positions(len(ids))
        kept, before = self._cache.keep_common_prefix(ids), replace(self._cache.stats)
        self._check_room(len(ids))
        answer, said = self._answer(ids, kept)
        self.last = Reply(
            prompt_tokens=len(ids),
            kept_tokens=kept,
            read_tokens=max(min(len(ids), self.held_tokens) - kept, 0),
            new_tokens=answer.new_tokens,
            stats=_since(before, self._cache.stats),
        )
        if said or (answer.failure is None and answer.stopped is None):
            self.messages, self.files = asked.answered(said), []
        if answer.failure is not None:
            raise answer.failure
        if code := answer.report_lost():
            raise typer.Exit(code)
        self._tell(answer, said)
        return answer.stopped

    def _answer(self, ids: list[int], kept: int) -> tuple[Answer, str]:
        """Return an answer, which is written as it comes, and its text."""
        talker = self._talker
        interrupt = Interrupt(talker.console)
        bar = PrefillBar(talker.console, len(ids) - kept, interrupt.check, transient=True)
        answer = Answer(
            replace(talker.request, seed=self._seed),
            talker.settings(len(ids)),
            *(talker.console, talker.model, talker.tokenizer),
            *(talker.offload, talker.offload.plan),
        )
        self._seed = None  # it is of the conversation, whose answers are not to be alike
        with interrupt.handling():
            answer.generate(ids, self._cache, bar, interrupt)
            interrupt.finishing = True
            return answer, answer.complete()

    def _tell(self, answer: Answer, said: str) -> None:
        """Tell how an answer ended, where that was not by itself."""
        console = self._talker.console
        if answer.stopped is not None and answer.stopped.by_hand:
            told = "stopped"
            if not said:
                told = "stopped before an answer; send it again to go on where the reading was"
            console.print(told)
        elif answer.stopped is None and answer.finish_reason == "length":
            tokens = counted(answer.new_tokens, "token")
            console.print(f"the answer ends at its {tokens} (--max-new-tokens)")

    def _check_positions(self, tokens: int) -> None:
        most = self._talker.positions
        if most and tokens > most and not self._talker.request.allow_long:
            raise OptionError(
                f"the conversation would have {tokens:,} tokens, but the model was made for "
                f"{counted_tokens(most, 'position')}; /clear begins anew, and --allow-long-prompt "
                "goes beyond"
            )

    def _check_room(self, tokens: int) -> None:
        """Refuse a first message whose session there is no room for; of later ones tell it once."""
        request, plan = self._talker.request, self._talker.offload.plan
        tokens += self._talker.settings(tokens).max_new_tokens
        try:
            check_room(self._cache, plan, request.save_session, tokens)
        except SessionRoomError as error:
            if not self.messages.said:
                raise
            if not self._told_of_room:
                self._talker.console.print(f"note: {error}; {SAVE_ELSEWHERE}", markup=False)
            self._told_of_room = True

    def save(self, path: str, *, ending: bool = False) -> None:
        """Save the cache as a session, and the messages with it.

        Args:
            path: of the session.
            ending: whether nothing is said any more, so that its first tokens are saved where the
                disk takes no more.

        Raises:
            OptionError: nothing was said.
            HeadInferError: it cannot be saved there.
        """
        if not self.messages.said:
            raise OptionError("nothing was said yet, so there is nothing to save")
        if not self._is_whole():
            self._begin_anew()
        console, plan = self._talker.console, self._talker.offload.plan
        if ending:
            save_at_the_end(console, self._cache, plan, path, self.messages)
        else:
            save_session(console, self._cache, path, self.messages)
        self.saved = self.messages

    def load(self, path: str) -> None:
        """Go on with a saved session, and with its messages where it has any.

        Raises:
            HeadInferError: it cannot be read, or is of another model. The conversation is as it
                was, though it may have to be read again.
        """
        # late, so that `--help` answers at once
        from headinfer.integration.saving import check_model
        from headinfer.saved.folder import read_index

        offload = self._talker.offload
        check_sessions(path, None, split=False)
        check_model(read_index(path), offload.session.fingerprint(), path)
        messages = Messages.read(path)
        if not self._talker.request.raw:
            values = self._talker.request.template_values
            check_template(self._talker.tokenizer, messages.system, values)
        self._cache.close()  # before: two may not fit
        try:
            with Stages(self._talker.console) as stages:
                stages.begin(f"loading session {path}")
                self._cache = offload.load_cache(path, partial=True)
        except BaseException:
            self._cache = offload.new_cache()
            raise
        self.messages, self.files, self.last = messages, [], None

    def _begin_anew(self) -> None:
        """Take an empty cache in place of the one there is."""
        self._cache.close()
        self._cache = self._talker.offload.new_cache()

    def _is_whole(self) -> bool:
        """Whether all layers of the cache hold the same tokens: not where a call was cut off."""
        try:
            self._cache.begin_call()
        except CacheStateError:
            return False
        self._cache.end_call()
        return True


def _since(before: "Stats", after: "Stats") -> "Stats":
    """Return what was measured between two moments; peaks are those of the later one."""
    since = {
        field.name: _difference(getattr(after, field.name), getattr(before, field.name))
        for field in fields(after)
        if field.name not in _PEAKS
    }
    return replace(after, **since)


def _difference(later: Any, earlier: Any) -> Any:
    """Return a difference of numbers, or of those of each device, if there were any before."""
    if isinstance(later, tuple):
        return tuple(map(operator.sub, later, earlier or (0.0,) * len(later)))
    return later - earlier
