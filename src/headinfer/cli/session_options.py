"""`--session` and `--save-session`: a KV cache that outlives the process."""

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headinfer.cli.options import OUTPUT_PANEL, PROMPT_PANEL
from headinfer.cli.stages import Stages
from headinfer.errors import HeadInferError, OptionError, SessionFileError, SessionRoomError
from headinfer.units import counted, format_bytes, format_si

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache
    from headinfer.integration.saving import SavedSession
    from headinfer.offload import Offload
    from headinfer.plan.plan import Plan
    from headinfer.saved.messages import Messages

_SHARE_OF_ROOM = 0.9
"""What tokens may take of the free disk, where a session does not fit as a whole."""

_ID_BYTES = 8
"""What the id of a token takes, beside its keys and values."""

Session = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="FOLDER",
        help="Go on with a saved session: what the prompt shares with it is not read again.",
        rich_help_panel=PROMPT_PANEL,
    ),
]
SaveSession = Annotated[
    str | None,
    typer.Option(
        "--save-session",
        metavar="FOLDER",
        help="Save the KV cache there at the end, also when the answer was interrupted.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


def check_sessions(session: str | None, save_session: str | None, *, split: bool) -> None:
    """Refuse sessions that are not there, and places where none can be saved, before any work.

    Args:
        session: to go on with.
        save_session: where to save one.
        split: whether the model is split over several GPUs.

    Raises:
        SessionFileError: says what is wrong.
        OptionError: there are no sessions of models that are split.
    """
    if session is None and save_session is None:
        return
    if split:
        raise OptionError(
            "--session and --save-session serve one GPU; leave out --gpus and --tensor-parallel"
        )
    # late, so that `--help` answers at once
    from headinfer.saved.folder import read_index, try_place

    if session is not None and (rows := read_index(session).rows) != 1:
        raise SessionFileError(f"session {session!r} holds {rows} rows; --session goes on with one")
    if save_session is not None:
        try_place(save_session)


def check_room(
    cache: "OffloadedCache", plan: "Plan", save_session: str | None, tokens: int
) -> None:
    """Refuse a session that the disk plainly has no room for, before anything is read.

    Args:
        cache: what another session has of it need not be written again.
        plan: of the attachment.
        save_session: where to save it; None where that is not asked for.
        tokens: of prompt and answer together, if the answer is as long as it may be.

    Raises:
        SessionRoomError: there is too little room now.
    """
    if save_session is None:
        return
    from headinfer.saved import folder

    held = 0 if cache.saved is None else sum(page.tokens for page in cache.saved.pages)
    new = tokens - 1 - held  # the last token of an answer is never read
    with contextlib.suppress(OSError):  # where the system does not tell, saving will
        folder.check_room(save_session, plan.shape.kv_bytes(new), new)


def check_rows(rows: int, *names: str | None) -> None:
    """Refuse sessions of several rows.

    Args:
        rows: of the generation.
        names: of sessions, where any are given.

    Raises:
        OptionError: there are some, and beams.
    """
    if rows > 1 and any(name is not None for name in names):
        raise OptionError(
            f"sessions are of one row, and there are {rows} beams; give --num-beams 1"
        )


def open_cache(
    console: Console, offload: "Offload", session: str | None, ids: list[int], max_tokens: int
) -> tuple["OffloadedCache", int]:
    """Return the cache of an answer, and how many tokens of the prompt it has already.

    Args:
        console: on stderr; told what of a session is used.
        offload: the attachment.
        session: the folder of one; None to begin with an empty cache.
        ids: the prompt.
        max_tokens: tokens to reserve CPU memory for.

    Raises:
        SessionFileError: the session is of another model, or cannot be read.
        MemoryPlanError: it does not fit.
    """
    if session is None:
        return offload.new_cache(max_tokens), 0
    with Stages(console) as stages:
        stages.begin(f"loading session {session}")
        cache = offload.load_cache(session, max_tokens, partial=True)
    held = cache.get_seq_length()
    kept = cache.keep_common_prefix(ids)
    told = f"{kept:,} of the prompt's {len(ids):,} need not be read again"
    if not kept:
        told = "none of them is used: the prompt begins otherwise, or the model cannot go back"
    told = f"session {session}: {counted(held, 'token')}; {told}"
    console.print(told, markup=False)
    return cache, kept


def save_session(
    console: Console, cache: "OffloadedCache", session: str, messages: "Messages | None" = None
) -> None:
    """Save a cache, with the messages of a conversation, and tell how large it is.

    Raises:
        SessionFileError: it cannot be saved.
        CacheStateError: it was interrupted half-way, or holds nothing.
    """
    with Stages(console) as stages:
        stages.begin(f"saving session {session}")
        saved = cache.save(session, messages=messages)
    _tell_saved(console, session, saved)


def save_at_the_end(
    console: Console,
    cache: "OffloadedCache",
    plan: "Plan",
    session: str,
    messages: "Messages | None" = None,
) -> None:
    """Save a cache that nobody needs any more: its first tokens where the disk takes no more.

    Args:
        console: on stderr.
        cache: what is not saved of it is lost.
        plan: of the attachment.
        session: where to save it. One that is there stays where the new one is not whole.
        messages: of a conversation.

    Raises:
        SessionRoomError: not all of it was saved; says how much.
        SessionFileError: it cannot be saved.
        CacheStateError: it was interrupted half-way, or holds nothing.
    """
    new = not os.path.exists(session)
    try:
        save_session(console, cache, session, messages)
    except SessionRoomError as error:
        held = cache.get_seq_length()
        saved = _save_less(cache, plan, session, messages) if new else None
        if saved is None:
            raise
        raise SessionRoomError(
            f"{error}; the first {saved.tokens:,} of its {counted(held, 'token')} were saved, and "
            "--session goes on from there"
        ) from error


def _save_less(
    cache: "OffloadedCache", plan: "Plan", session: str, messages: "Messages | None"
) -> "SavedSession | None":
    """Save as many of the first tokens as the disk takes; None where that is none of them."""
    with contextlib.suppress(OSError, RuntimeError, HeadInferError):  # models that cannot go back
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(session))).free
        room = int(free * _SHARE_OF_ROOM) // max(plan.shape.kv_bytes(1) + _ID_BYTES, 1)
        tokens = min(room, cache.get_seq_length())
        if tokens > 0:
            cache.crop(tokens - cache.get_seq_length())
            return cache.save(session, messages=messages)
    return None


def _tell_saved(console: Console, session: str, saved: "SavedSession") -> None:
    rate = saved.num_bytes / max(saved.seconds, 1e-9)
    console.print(
        f"session: {counted(saved.tokens, 'token')} saved to "
        f"{os.path.normpath(session)}, "
        f"{format_bytes(saved.num_bytes)} at {format_si(rate, 'B/s')}",
        markup=False,
    )
