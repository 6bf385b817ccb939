"""Saving a cache as a session, and filling a new one from it.

The pages go first to a buffer, and from there to the disk in another thread, or the other way. So
no second copy of the cache is ever in memory.
"""

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headinfer.engine.saving import SavableTokens, as_pairs
from headinfer.errors import SessionFileError
from headinfer.folders import describe
from headinfer.integration import own_states
from headinfer.integration.layer import OffloadedLayer
from headinfer.integration.saved_pages import SavedPages
from headinfer.kv.pair import KV
from headinfer.saved.folder import holding, read_index, session_name
from headinfer.saved.index import FileEntry, Index, Page
from headinfer.saved.layout import Layout, Spec
from headinfer.saved.reader import DamagedFileError, read_files
from headinfer.saved.tokens import TOKEN_IDS
from headinfer.saved.writer import SessionWriter, writing
from headinfer.units import counted

if TYPE_CHECKING:
    from headinfer.integration.cache import OffloadedCache
    from headinfer.saved.fingerprint import Fingerprint

_logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 * 2**20
"""Bytes of a page: large enough for any disk's rate, and what a damaged place costs."""

_IDS = TOKEN_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A record of a session that was saved.

    Attributes:
        tokens: of each row.
        num_bytes: that were written.
        seconds: that it took.
    """

    tokens: int
    num_bytes: int
    seconds: float


def save_cache(
    cache: "OffloadedCache",
    engine: SavableTokens,
    model: "Fingerprint",
    path: str | os.PathLike[str],
    block_bytes: int,
    messages: bytes | None = None,
) -> SavedSession:
    """Write all that a cache holds to a folder; see `OffloadedCache.save`."""
    started_s = time.perf_counter()
    ids = cache.token_ids
    rows, tokens = engine.plan.batch, cache.get_seq_length()
    states = _states_of(cache, engine)
    values = {str(at): own_states.described(layer) for at, layer in _own_layers(cache)}
    engine.begin_saving()
    page_bytes = _page_layout(engine, rows, 1, with_ids=ids is not None)
    per_token = sum(spec.num_bytes for spec in page_bytes.specs.values())
    page_tokens = max(min(block_bytes // max(per_token, 1), tokens), 1)
    state_layout = Layout({name: Spec(part.dtype, (*part.shape,)) for name, part in states.items()})
    known = None if ids is None else cache.saved  # all pages have token ids, or none has
    spared = () if known is None else known.still_there(page_tokens)
    new_tokens = tokens - sum(page.tokens for page in spared)
    more_bytes = state_layout.num_bytes + len(messages or b"")
    with writing(path, per_token * new_tokens + more_bytes) as writer:
        there = () if known is None else known.reuse(writer, page_tokens)
        begin = sum(page.tokens for page in there)
        pages = [
            _write_page(writer, engine, ids, rows, start, min(page_tokens, tokens - start))
            for start in range(begin, tokens, page_tokens)
        ]
        entry: FileEntry | None = None
        if states:
            for name, place in writer.begin(state_layout).items():
                place.copy_(states[name])
            entry = writer.end(state_layout, "states")
        index = Index(
            rows=rows,
            tokens=tokens,
            with_ids=ids is not None,
            kv_dtype=_name(engine.dtype),
            computed_dtype=cache.state.computed_dtype,
            tracks=engine.described_tracks,
            pages=(*there, *pages),
            states=entry,
            state_values=values,
            model=model,
            rounded=engine.plan.shape.host_format.value if engine.plan.rounds else cache.rounded,
            messages_crc32=None if messages is None else zlib.crc32(messages),
        )
        written_by = {name: version(name) for name in ("headinfer", "torch", "transformers")}
        writer.commit(index, written_by, messages)
    cache.saved = SavedPages.of(path, index)
    seconds = time.perf_counter() - started_s
    written = index.num_bytes - sum(page.entry.num_bytes for page in there)
    return SavedSession(tokens=tokens, num_bytes=written, seconds=seconds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _page_layout(engine: SavableTokens, rows: int, tokens: int, *, with_ids: bool) -> Layout:
    specs = {_IDS: Spec(torch.int64, (rows, tokens))} if with_ids else {}
    for track in engine.full_tracks:
        keys, values = engine.part_shapes(track, tokens)
        specs[f"tracks.{track}.keys"] = Spec(engine.dtype, keys)
        specs[f"tracks.{track}.values"] = Spec(engine.dtype, values)
    return Layout(specs)


def _write_page(
    writer: SessionWriter,
    engine: SavableTokens,
    ids: torch.Tensor | None,
    rows: int,
    start: int,
    tokens: int,
) -> Page:
    layout = _page_layout(engine, rows, tokens, with_ids=ids is not None)
    places = writer.begin(layout)
    if ids is not None:
        places[_IDS].copy_(ids[:, start : start + tokens])
    engine.copy_page(start, _pairs_of(places, engine.full_tracks))
    return Page(start=start, tokens=tokens, entry=writer.end(layout))


def _pairs_of(parts: dict[str, torch.Tensor], tracks: Sequence[int]) -> list[KV]:
    names = [f"tracks.{track}.{part}" for track in tracks for part in ("keys", "values")]
    return as_pairs([parts[name] for name in names])


def _states_of(cache: "OffloadedCache", engine: SavableTokens) -> dict[str, torch.Tensor]:
    """Return windows and recurrent states by name, on the CPU: some MiB in all."""
    states = {}
    for track, start, kv in engine.copy_windows():
        states[f"tracks.{track}.start"] = torch.tensor([start])
        states[f"tracks.{track}.keys"], states[f"tracks.{track}.values"] = kv
    for at, layer in _own_layers(cache):
        for name, part in own_states.tensors(layer):
            states[f"layers.{at}.{name}"] = part.cpu()
    return states


def _own_layers(cache: "OffloadedCache") -> Iterator[tuple[int, Any]]:
    """Yield the layers that are transformers' own, each with its number."""
    for at, layer in enumerate(cache.layers):
        if not isinstance(layer, OffloadedLayer):
            yield at, layer


def fill_cache(
    cache: "OffloadedCache",
    model: "Fingerprint",
    path: str | os.PathLike[str],
    *,
    partial: bool,
) -> None:
    """Put a session's tokens into an empty cache, which is closed where that fails.

    Args:
        cache: to be filled.
        model: whose cache it is.
        path: of the session.
        partial: whether to go on with the tokens before a damaged place, and to log that.

    Raises:
        SessionFileError: there is no session, it is of another model, or is damaged.
        MemoryPlanError: the device or the host memory is too small.
    """
    try:
        read_index(path)  # which refuses what is no folder
        with holding(Path(path), alone=False):
            _fill(cache, read_index(path), model, path, partial=partial)
    except OSError as error:
        cache.close()
        told = f"session {session_name(path)!r} cannot be read: {describe(error)}"
        raise SessionFileError(told) from error
    except BaseException:
        cache.close()
        raise


def check_model(index: Index, model: "Fingerprint", name: str) -> None:
    """Refuse a session of another model.

    Raises:
        SessionFileError: says what differs.
    """
    difference = model.difference(index.model)
    if difference is not None:
        raise SessionFileError(f"session {name!r} is of another model: {difference}")


def _check_tracks(engine: SavableTokens, index: Index, name: str) -> None:
    if engine.described_tracks == index.tracks:
        return

    def streaming(tracks: list[list[dict[str, Any]]]) -> int:
        return sum(len(track["streaming_heads"]) for layer in tracks for track in layer)

    there, here = streaming(index.tracks), streaming(engine.described_tracks)
    raise SessionFileError(
        f"session {name!r} was saved with {counted(there, 'streaming head')} and here there are "
        f"{here}, or others; give the same sparsity, head pattern, sinks and recent tokens"
    )


def _fill(
    cache: "OffloadedCache",
    index: Index,
    model: "Fingerprint",
    path: str | os.PathLike[str],
    *,
    partial: bool,
) -> None:
    name = session_name(path)
    check_model(index, model, name)
    kv_dtype = getattr(torch, index.kv_dtype)
    engine = cache.state.begin_loading(index.rows, index.tokens, kv_dtype, index.computed_dtype)
    _check_tracks(engine, index, name)
    kept = _Kept()
    try:
        if index.states is not None:
            with contextlib.closing(read_files(path, [index.states])) as files:
                _take_states(cache, engine, index, next(files))
        with contextlib.closing(read_files(path, [page.entry for page in index.pages])) as files:
            for page, parts in zip(index.pages, files, strict=True):
                _take_page(cache, engine, page, parts, with_ids=index.with_ids)
                kept.tokens = page.start + page.tokens
    except DamagedFileError as error:
        told = _damage(error, index, kept)
        if not partial:
            raise SessionFileError(told) from error
        _logger.warning("%s; the rest is to be read again", told)
    if kept.tokens:
        cache.saved = SavedPages.of(path, index).cropped(kept.tokens)
        cache.rounded = index.rounded
        if index.rounded is not None:
            told = "session %r has keys and values that were rounded to 8 bits (%s): not exact"
            _logger.warning(told, name, index.rounded)
        engine.end_loading()
        for layer in cache.layers:
            if isinstance(layer, OffloadedLayer):
                layer.note_loaded(engine.torch_device(0), engine.dtype)
    else:
        cache.reset()


@dataclass(slots=True)
class _Kept:
    """A count of the tokens that were taken.

    Attributes:
        tokens: of each row, from the first on.
    """

    tokens: int = 0


def _damage(error: DamagedFileError, index: Index, kept: _Kept) -> str:
    """Say what a damaged file costs; of windows and states there are only the last ones."""
    if index.states is not None:
        kept.tokens = 0
        return (
            f"{error}; none of the {counted(index.tokens, 'token')} can be used, as this model's "
            "windows or states are there for the last one alone"
        )
    return f"{error}; the {kept.tokens:,} of {counted(index.tokens, 'token')} before it can be used"


def _take_page(
    cache: "OffloadedCache",
    engine: SavableTokens,
    page: Page,
    parts: dict[str, torch.Tensor],
    *,
    with_ids: bool,
) -> None:
    wanted = _page_layout(engine, engine.plan.batch, page.tokens, with_ids=with_ids).specs
    if {name: (part.dtype, (*part.shape,)) for name, part in parts.items()} != wanted:
        raise DamagedFileError(f"{page.entry.file} holds other tensors than the index says")
    engine.take_page(_pairs_of(parts, engine.full_tracks))
    cache.history.append(parts[_IDS] if with_ids else None)


def _take_states(
    cache: "OffloadedCache", engine: SavableTokens, index: Index, parts: dict[str, torch.Tensor]
) -> None:
    assert index.states is not None
    try:
        for track in engine.window_tracks:
            (kv,) = _pairs_of(parts, [track])
            engine.take_window(track, int(parts[f"tracks.{track}.start"]), kv)
        for at, layer in _own_layers(cache):
            prefix = f"layers.{at}."
            saved = {
                name.removeprefix(prefix): part
                for name, part in parts.items()
                if name.startswith(prefix)
            }
            values = index.state_values[str(at)]
            own_states.restore(
                layer, values, saved, engine.torch_device(0), index.model.transformers
            )
    except KeyError as error:
        raise DamagedFileError(f"{index.states.file} lacks {error}") from error
