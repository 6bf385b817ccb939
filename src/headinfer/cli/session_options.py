"""`--session` and `--save-session`: a KV cache that outlives the process."""

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from headinfer.cli.options import OUTPUT_PANEL, PROMPT_PANEL
from headinfer.cli.stages import Stages
from headinfer.errors import OptionError, SessionFileError
from headinfer.units import format_bytes

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache
    from headinfer.offload import Offload
    from headinfer.saved.messages import Messages

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
    from headinfer.saved.folder import check_saveable, read_index

    if session is not None and (rows := read_index(session).rows) != 1:
        raise SessionFileError(f"session {session!r} holds {rows} rows; --session goes on with one")
    if save_session is not None:
        check_saveable(save_session)


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
    told = f"session {session}: {held:,} tokens; {told}"
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
    rate = saved.num_bytes / max(saved.seconds, 1e-9)
    console.print(
        f"session: {saved.tokens:,} tokens saved to {os.path.normpath(session)}, "
        f"{format_bytes(saved.num_bytes)} at {rate / 1e9:.1f} GB/s",
        markup=False,
    )
