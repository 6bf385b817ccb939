"""The files of a session: what survives damage, full disks, signals and crashes."""

import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import headinfer
from headinfer.errors import SessionFileError, SessionRoomError
from headinfer.integration.calls import cache_argument
from headinfer.offload import Offload
from headinfer.saved.messages import Messages
from tiny_models import random_tokens, shared_model

BLOCK = "20KiB"
TOKENS = 200


@pytest.fixture
def offload() -> Iterator[Offload]:
    with headinfer.attach(shared_model("llama3"), chunk_tokens=32, tile_tokens=16) as attached:
        yield attached


def filled(offload: Offload, name: str = "llama3", seed: int = 1) -> Any:
    model, cache = shared_model(name), offload.new_cache()
    model(random_tokens(1, TOKENS, seed=seed), **cache_argument(model, cache))
    return cache


@pytest.fixture
def session(offload: Offload, tmp_path: Path) -> Path:
    filled(offload).save(tmp_path / "s", block_bytes=BLOCK)
    return tmp_path / "s"


def pages(session: Path) -> list[Path]:
    return sorted(session.glob("*-0*.safetensors"))


def content(session: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in session.iterdir()}


def test_pages_are_files_of_safetensors(offload: Offload, session: Path) -> None:
    tensors = [safetensors.torch.load_file(path) for path in pages(session)]
    assert len(tensors) > 5
    assert all(path.stat().st_size < 21 * 2**10 for path in pages(session))
    ids = torch.cat([each["token_ids"] for each in tensors], dim=1)
    assert torch.equal(ids, random_tokens(1, TOKENS))
    cache = filled(offload)
    for track, layer in enumerate(cache.layers):
        for part in ("keys", "values"):
            joined = torch.cat([each[f"tracks.{track}.{part}"] for each in tensors], dim=2)
            assert torch.equal(joined, getattr(layer, part))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "changed": (flip, "is damaged: its checksum"),
    "header": (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), "is damaged"),
    "cut": (lambda path: os.truncate(path, 100), "is cut off: it should have"),
    "empty": (lambda path: path.write_bytes(b""), "and has 0"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is too long"),
    "missing": (Path.unlink, "is missing"),
    "folder": (lambda path: (path.unlink(), path.mkdir())[0], "cannot be read"),
}


@pytest.mark.covering
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("page", [0, 3, -1])
def test_the_tokens_before_a_damaged_page_can_be_used(
    offload: Offload, session: Path, page: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, words = DAMAGES[damage]
    path = pages(session)[page]
    each = safetensors.torch.load_file(pages(session)[0])["token_ids"].shape[1]
    before = each * pages(session).index(path)
    spoil(path)
    with pytest.raises(SessionFileError) as told:
        offload.load_cache(session)
    assert path.name in str(told.value)
    assert words in str(told.value)
    assert f"the {before} of {TOKENS} tokens before it can be used" in str(told.value)
    assert "\n" not in str(told.value)
    cache = offload.load_cache(session, partial=True)
    (record,) = caplog.records
    assert f"the {before} of {TOKENS} tokens" in record.getMessage()
    tokens, model = random_tokens(1, TOKENS), shared_model("llama3")
    assert cache.get_seq_length() == before == cache.keep_common_prefix(tokens[0])
    logits = model(tokens[:, before:], **cache_argument(model, cache)).logits
    torch.testing.assert_close(logits, model(tokens).logits[:, before:])


@pytest.mark.covering
@pytest.mark.parametrize("name", ["gemma3", "qwen3-next"])
@pytest.mark.parametrize("part", ["-000002", "-states"])
def test_windows_and_states_are_used_with_all_tokens_or_not(
    name: str, part: str, tmp_path: Path
) -> None:
    model, tokens = shared_model(name), random_tokens(1, TOKENS)
    with headinfer.attach(model, chunk_tokens=32, tile_tokens=16) as offload:
        filled(offload, name).save(tmp_path / "s", block_bytes="8KiB")
        (path,) = (tmp_path / "s").glob(f"*{part}.safetensors")
        flip(path)
        with pytest.raises(SessionFileError, match=f"none of the {TOKENS} tokens can be used"):
            offload.load_cache(tmp_path / "s")
        cache = offload.load_cache(tmp_path / "s", partial=True)
        assert cache.get_seq_length() == 0
        logits = model(tokens, **cache_argument(model, cache)).logits
        torch.testing.assert_close(logits, model(tokens).logits)


@pytest.mark.parametrize("at", range(0, 4000, 400))
def test_no_changed_index_is_believed(offload: Offload, session: Path, at: int) -> None:
    index = session / "index.json"
    data = bytearray(index.read_bytes())
    data[at % len(data)] ^= 1
    index.write_bytes(data)
    with pytest.raises(SessionFileError) as told:
        offload.load_cache(session, partial=True)
    assert "\n" not in str(told.value)


def test_pages_of_two_sessions_cannot_be_mixed(
    offload: Offload, session: Path, tmp_path: Path
) -> None:
    filled(offload, seed=2).save(tmp_path / "other", block_bytes=BLOCK)
    pages(session)[2].write_bytes(pages(tmp_path / "other")[2].read_bytes())
    with pytest.raises(SessionFileError, match="is damaged: its checksum"):
        offload.load_cache(session)


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Have the synchronisation of a save's file fail: of the disk's calls the last."""
    real, count = os.fsync, iter(range(10**6))

    def fsync(opened: int) -> None:
        if next(count) == number:
            raise error
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.covering
@pytest.mark.parametrize("number", [0, 4, 9])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")]
)
def test_what_was_there_is_whole_when_the_disk_fails(
    offload: Offload,
    session: Path,
    tmp_path: Path,
    number: int,
    error: OSError,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, cache = content(session), filled(offload, seed=2)
    fail_at(monkeypatch, number, error)
    with pytest.raises(SessionFileError, match=rf"{error.strerror}; .* are needed, and the sess"):
        cache.save(session, block_bytes=BLOCK)
    assert content(session) == before
    assert offload.load_cache(session).get_seq_length() == TOKENS
    monkeypatch.undo()
    fail_at(monkeypatch, number, error)
    with pytest.raises(SessionFileError, match=error.strerror):
        cache.save(tmp_path / "new", block_bytes=BLOCK)
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    cache.save(session)  # a cache outlives a save that failed
    assert offload.load_cache(session).keep_common_prefix(random_tokens(1, TOKENS, seed=2)[0]) > 0


def said(text: str) -> Messages:
    return Messages().with_next(text).answered("yes")


def test_a_cache_and_its_messages_are_replaced_together_or_not_at_all(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, caches = tmp_path / "s", [filled(offload, seed=seed) for seed in (1, 2)]
    caches[0].save(session, messages=said("first"))
    before, failures = content(session), 0
    while True:  # at each call of the disk, until none is left to fail
        fail_at(monkeypatch, failures, OSError(28, "No space left on device"))
        try:
            caches[1].save(session, messages=said("second"))
        except SessionRoomError:
            assert content(session) == before
            failures += 1
        else:
            break
        finally:
            monkeypatch.undo()
    assert failures == 4, "a page, the folder, the index and the messages"
    assert Messages.read(str(session)) == said("second")
    assert content(session).keys() != before.keys()
    caches[0].save(session)
    assert Messages.read(str(session)) == said("second"), "they stay where none are given"


def test_old_messages_go_where_the_new_ones_cannot_take_their_place(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, replace = tmp_path / "s", os.replace
    filled(offload, seed=1).save(session, messages=said("first"))

    def failing(source: Path, target: Path) -> None:
        if target.name == "messages.json":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(SessionFileError, match="saved without its messages: Input/output error"):
        filled(offload, seed=2).save(session, messages=said("second"))
    assert Messages.read(str(session)) == Messages()
    assert offload.load_cache(session).get_seq_length() == TOKENS


def test_a_crash_before_the_messages_take_their_place_costs_none(
    offload: Offload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, replace = tmp_path / "s", os.replace
    filled(offload, seed=1).save(session, messages=said("first"))

    def dying(source: Path, target: Path) -> None:
        if target.name == "messages.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        filled(offload, seed=2).save(session, messages=said("second"))
    monkeypatch.undo()
    assert Messages.read(str(session)) == said("second"), "they are of the session that is there"
    filled(offload, seed=3).save(session)
    assert Messages.read(str(session)) == said("second"), "they stay where none are given"


def test_messages_of_another_save_are_refused(offload: Offload, tmp_path: Path) -> None:
    session, other = tmp_path / "s", tmp_path / "t"
    filled(offload, seed=1).save(session, messages=said("first"))
    filled(offload, seed=2).save(other, messages=said("second"))
    (session / "messages.json").write_bytes((other / "messages.json").read_bytes())
    with pytest.raises(SessionFileError, match="not the one that was saved with it; remove"):
        Messages.read(str(session))
    (session / "messages.json").unlink()
    assert Messages.read(str(session)) == Messages()


def test_a_disk_without_room_is_told_before_anything_is_written(
    offload: Offload, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cache = content(session), filled(offload)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    told = r"needs 30\d.* KiB on disk, beside the one that is there, and 1000 B are free"
    with pytest.raises(SessionFileError, match=told):
        cache.save(session)
    assert content(session) == before


@pytest.mark.skipif(sys.platform == "win32", reason="its signals end a process")
def test_ctrl_c_while_saving_loses_nothing(
    offload: Offload, session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, cache = content(session), filled(offload, seed=2)
    real, main = os.fsync, threading.main_thread().ident
    assert main is not None

    def fsync(opened: int) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        real(opened)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        cache.save(session, block_bytes=BLOCK)
    monkeypatch.undo()
    assert content(session) == before
    assert not [each for each in threading.enumerate() if "session" in each.name]
    cache.save(session, block_bytes=BLOCK)
    assert content(session).keys() != before.keys()


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import headinfer
from tiny_models import random_tokens, tiny_model
real, count = os.{function}, iter(range(10**6))
def killing(*args):
    if next(count) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
model = tiny_model("llama3")
with headinfer.attach(model) as offload:
    cache = offload.new_cache()
    model(random_tokens(1, {tokens}, seed=2), **cache.as_keyword())
    os.{function} = killing
    cache.save({session!r}, block_bytes="20KiB")
"""


@pytest.mark.covering(most=1)
@pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGKILL")
@pytest.mark.parametrize(("function", "number"), [("fsync", 3), ("replace", 0), ("unlink", 0)])
def test_a_crash_leaves_one_whole_session(
    offload: Offload, session: Path, function: str, number: int
) -> None:
    before = content(session)
    program = KILLED.format(
        tests=str(Path(__file__).parents[1]),
        function=function,
        number=number,
        tokens=TOKENS,
        session=str(session),
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(content(session)) > len(before)
    seed = 2 if function == "unlink" else 1  # the new one is whole when the old one goes
    ids = offload.load_cache(session).token_ids
    assert ids is not None
    assert torch.equal(ids, random_tokens(1, TOKENS, seed=seed))
    filled(offload).save(session)
    assert len(content(session)) == 2  # what the crash left is gone


def test_a_session_that_is_being_read_is_not_replaced(offload: Offload, session: Path) -> None:
    program = f"""
import fcntl, os, sys
opened = os.open({str(session)!r}, os.O_RDONLY)
fcntl.flock(opened, fcntl.LOCK_SH)
print("held", flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    before = content(session)
    with pytest.raises(SessionFileError, match="by another process"):
        filled(offload).save(session)
    assert offload.load_cache(session).get_seq_length() == TOKENS  # readers may be several
    other.stdin.close()
    other.wait()
    assert content(session) == before


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("x"), "there is a file of that name"),
        (lambda path: (path.mkdir(), (path / "notes.txt").write_text("x")), "'notes.txt'"),
        (lambda path: path.symlink_to(path.parent / "no" / "where"), "cannot be saved"),
    ],
    ids=["file", "folder", "link"],
)
def test_nothing_else_is_overwritten(
    offload: Offload, tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    make(tmp_path / "s")
    with pytest.raises(SessionFileError) as told:
        filled(offload).save(tmp_path / "s")
    assert words in str(told.value)


def test_pages_are_all_the_memory_that_it_takes(tmp_path: Path) -> None:
    """No second copy of the cache: torch's own memory, by what a page and a window have."""
    model = shared_model("llama3")
    with headinfer.attach(model) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 1500), **cache_argument(model, cache))
        allocated: list[int] = []
        real = torch.empty

        def empty(*args: Any, **keywords: Any) -> torch.Tensor:
            made = real(*args, **keywords)
            allocated.append(made.nbytes)
            return made

        tracemalloc.start()
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch, "empty", empty)
                saved = cache.save(tmp_path / "s", block_bytes="64KiB")
                assert saved.num_bytes > 2**21
                assert sum(allocated) <= 2 * 66 * 2**10
                allocated.clear()
                offload.load_cache(tmp_path / "s")
                held = offload.plan.kv_host_bytes(1500)
                assert sum(allocated) <= held + 2 * 66 * 2**10
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
