"""Prefixes on the disk: what memory has no room for, and what is there after a restart."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, stock_text, tokens

from headinfer.errors import OptionError
from headinfer.serving import desk as desk_module
from headinfer.serving.desk import Desk
from saved_models import make_tokenizer
from tiny_models import VOCAB, shared_model

PER_TOKEN = 3 * 4 * 2 * 16 * 4
"""Bytes of a token of the tiny llama3: layers, heads, keys and values, dim, bytes."""


def cached(desk: Desk, name: str, ids: tuple[int, ...]) -> int:
    """Ask, hold the answer against stock's, and return how much was not read again."""
    heard = answer(desk, ask(ids, 5))
    assert heard.text == stock_text(name, ids, 5)
    return heard.ended.usage.cached_tokens


@pytest.mark.covering
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_a_restart_finds_what_was_kept(name: str, device: str, tmp_path: Path) -> None:
    text = tokens(150)
    with desk_of(name, session_folder=tmp_path / "kept") as desk:
        heard = answer(desk, ask(text, 5, logprobs=0))
        said = tuple(score.token_id for piece in heard.pieces for score in piece.tokens)
    with desk_of(name, options={"device": device}, session_folder=tmp_path / "kept") as desk:
        saved = [each for each in desk.slots() if each.state == "saved"]
        assert max(each.tokens for each in saved) == 154
        assert all(each.disk_bytes > 0 for each in saved)
        assert cached(desk, name, (*text, *said, *tokens(9, seed=4))) == 154
        assert cached(desk, name, (*text, *tokens(9, seed=6))) == 150
    with desk_of(name, session_folder=tmp_path / "kept") as desk:
        assert cached(desk, name, (*text, *tokens(9, seed=6), 5)) == 159


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("end", [{}, {"kept_memory": "1B"}])
def test_rounded_prefixes_are_kept_in_memory_alone(end: dict[str, Any], tmp_path: Path) -> None:
    """An exact server finds none of them, and one that rounds takes none of an exact one."""
    text, rounded = tokens(150), {"device": "simulated", "kv_cache": "int8"}
    with desk_of("llama3", options=rounded, session_folder=tmp_path, **end) as desk:
        answer(desk, ask(text, 5))
        if not end:
            assert answer(desk, ask((*text, 5), 5)).ended.usage.cached_tokens == 150
            sessions = desk._served.prefixes.sessions
            assert sessions is not None
            cache = sessions.fork(desk.slots()[0].id)
            assert cache is not None
            assert sessions.save(cache, "mine.hsession", None).tokens == 150 + 5 - 1
            assert sessions.restore("mine.hsession").tokens == 150 + 5 - 1
    with desk_of("llama3", session_folder=tmp_path) as desk:
        assert cached(desk, "llama3", text) == 0
    with desk_of("llama3", options=rounded, session_folder=tmp_path, **end) as desk:
        assert answer(desk, ask((*text, 5), 5)).ended.usage.cached_tokens == 0
    assert len(list(tmp_path.iterdir())) == 1 + (not end)


def test_what_memory_has_no_room_for_goes_to_the_disk_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with desk_of("llama3", kept_memory=f"{500 * PER_TOKEN}B", session_folder=folder) as desk:
        for seed in range(5):
            assert cached(desk, "llama3", tokens(200, seed=seed)) == 0
        shelf = desk._served.prefixes._shelf
        until_s = time.monotonic() + PATIENCE_S
        while shelf.kept_bytes > 500 * PER_TOKEN:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        states = [each.state for each in desk.slots()]
        assert states.count("kept") <= 2
        assert states.count("saved") >= 3
        for seed in range(5):
            assert cached(desk, "llama3", (*tokens(200, seed=seed), 7, 8)) == 200
    assert on_disk(folder) < 14 * 206 * PER_TOKEN


def on_disk(folder: Path) -> int:
    """Bytes of a folder's files; those that several sessions share count once."""
    files = {each.stat().st_ino: each.stat().st_size for each in folder.glob("*/*")}
    return sum(files.values())


@pytest.mark.slow
def test_a_folder_of_bounded_size_loses_what_was_used_least_recently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit = 720 * PER_TOKEN
    few = f"{210 * PER_TOKEN}B"
    texts = [tokens(200, seed=seed) for seed in range(3)]
    with desk_of("llama3", session_folder=tmp_path) as desk:
        cached(desk, "llama3", texts[0])
        (slot,) = desk.slots()
        desk.save_slot(slot.id, "named.hsession")
    options: dict[str, Any] = {"session_folder": tmp_path, "session_folder_size": limit}
    for text in texts[1:]:
        with desk_of("llama3", **options) as desk:
            assert cached(desk, "llama3", text) == 0
        assert on_disk(tmp_path) <= limit
    with desk_of("llama3", kept_memory=few, **options) as desk:
        assert cached(desk, "llama3", (*texts[1], 7)) == 200  # and so it is newer than the last
    with desk_of("llama3", **options) as desk:
        assert cached(desk, "llama3", tokens(200, seed=9)) == 0
    assert on_disk(tmp_path) <= limit
    with desk_of("llama3", **options) as desk:
        assert cached(desk, "llama3", (*texts[2], 7)) == 0
        assert cached(desk, "llama3", (*texts[0], 7)) == 200  # its name keeps it
        assert cached(desk, "llama3", (*texts[1], 7)) >= 200
        assert cached(desk, "llama3", tokens(900, seed=5)) == 0
    assert "no room" in caplog.text
    assert on_disk(tmp_path) <= limit


@pytest.mark.slow
def test_nothing_goes_for_one_that_is_too_large_in_any_case(tmp_path: Path) -> None:
    text, limit = tokens(200), f"{500 * PER_TOKEN}B"
    for each, known in ((text, 0), (tokens(900, seed=5), 0), ((*text, 7), 200)):
        with desk_of("llama3", session_folder=tmp_path, session_folder_size=limit) as desk:
            assert cached(desk, "llama3", each) == known


def test_of_two_that_have_nearly_all_of_each_other_one_is_saved(tmp_path: Path) -> None:
    text = tokens(400)
    with desk_of("llama3", session_folder=tmp_path) as desk:
        for seed in (4, 6):
            cached(desk, "llama3", (*text, seed))
        assert [each.tokens for each in desk.slots()] == [405, 405]
    with desk_of("llama3", session_folder=tmp_path) as desk:
        assert [each.tokens for each in desk.slots()] == [405]
        assert cached(desk, "llama3", (*text, 8)) == 400


def test_prefixes_of_another_model_are_left_alone(tmp_path: Path) -> None:
    with desk_of("llama3", session_folder=tmp_path) as desk:
        cached(desk, "llama3", tokens(60))
    with desk_of("qwen2", session_folder=tmp_path) as desk:
        assert desk.slots() == []
        assert cached(desk, "qwen2", tokens(60)) == 0
    assert len(list(tmp_path.iterdir())) == 2
    with desk_of("llama3", session_folder=tmp_path) as desk:
        assert cached(desk, "llama3", (*tokens(60), 9)) == 60


def test_a_session_is_used_by_its_name_before_a_restart_as_after_it(tmp_path: Path) -> None:
    with desk_of("llama3", session_folder=tmp_path) as desk:
        for seed, name in enumerate(("book", "book.hsession")):
            slot = answer(desk, ask(tokens(60, seed=seed), 5)).ended.slot_id
            assert slot is not None
            desk.save_slot(slot, name)
            desk._served.prefixes._shelf._evict_one()
        for path in tmp_path.iterdir():
            if path.name not in ("book", "book.hsession"):
                shutil.rmtree(path)  # as the bound of the folder has them removed
        desk._served.prefixes._shelf.saved = [
            each for each in desk._served.prefixes._shelf.saved if each.path.exists()
        ]
        before = [cached(desk, "llama3", (*tokens(60, seed=seed), 9)) for seed in range(2)]
    with desk_of("llama3", session_folder=tmp_path) as desk:
        names = {each.id for each in desk.slots()} & {"book", "book.hsession"}
    assert before == [0, 60]
    assert names == {"book.hsession"}


def test_links_out_of_the_folder_are_left_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        with desk_of("llama3", session_folder=folder) as desk:
            slot = answer(desk, ask(tokens(60), 5)).ended.slot_id
            assert slot is not None
            desk.save_slot(slot, "mine.hsession")
    for path in inside.iterdir():
        shutil.rmtree(path)
    (inside / "there.hsession").symlink_to(outside / "mine.hsession")
    (inside / f"{'0' * 16}.hsession").symlink_to(outside / "mine.hsession")
    with desk_of("llama3", session_folder=inside) as desk:
        assert desk.sessions() == []
        assert desk.slots() == []


def damage_index(folder: Path) -> None:
    (folder / "index.json").write_text("{}")


def damage_page(folder: Path) -> None:
    page = next(folder.glob("*-000000.safetensors"))
    data = bytearray(page.read_bytes())
    data[-100] ^= 255
    page.write_bytes(data)


def remove_page(folder: Path) -> None:
    next(folder.glob("*-000000.safetensors")).unlink()


@pytest.mark.parametrize("harm", [damage_index, damage_page, remove_page])
def test_a_damaged_prefix_is_left_out_with_a_warning(
    harm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with desk_of("llama3", session_folder=tmp_path) as desk:
        cached(desk, "llama3", tokens(60))
    (folder,) = tmp_path.iterdir()
    harm(folder)
    with (
        caplog.at_level(logging.WARNING, "headinfer"),
        desk_of("llama3", session_folder=tmp_path) as desk,
    ):
        for _ in range(2):
            assert cached(desk, "llama3", (*tokens(60), 9)) in (0, 60)
        assert folder.name in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OptionError, match="session_folder"),
        desk_of("llama3", session_folder=tmp_path / "file"),
    ):
        pass


@pytest.mark.slow
def test_a_long_prompt_is_saved_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed in the middle loses what is newer than the last piece."""
    monkeypatch.setattr(desk_module, "_GROW_BYTES", 200 * PER_TOKEN)
    program = f"""
import os, sys, time
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import torch
torch.set_num_threads(1)
from desk_helpers import *
from headinfer.serving import desk as module
module._GROW_BYTES = {200 * PER_TOKEN}

def hear(event):
    if isinstance(event, Progress):
        print(event.processed, flush=True)
        if event.processed > 900:
            time.sleep(600)

with desk_of("llama3", session_folder={str(tmp_path)!r}) as desk:
    desk.submit(ask(tokens(1500)), hear).wait(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 900:
            break
    until_s = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("*.hsession/index.json")):
        assert time.monotonic() < until_s
        time.sleep(0.05)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with desk_of("llama3", session_folder=tmp_path) as desk:
        assert 200 <= cached(desk, "llama3", tokens(1500)) <= 950
        assert len(list(tmp_path.iterdir())) <= 2


def test_what_grows_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "_GROW_BYTES", 100 * PER_TOKEN)
    model = shared_model("llama3")
    import headinfer

    headinfer.attach(model, device="cpu", chunk_tokens=16)
    desk = Desk(model, make_tokenizer(VOCAB), session_folder=tmp_path)
    heard = answer(desk, ask(tokens(700), 5), Heard())
    assert heard.text == stock_text("llama3", tokens(700), 5)
    until_s = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("*.hsession/index.json")):
        assert time.monotonic() < until_s, "nothing was saved before the end"
        time.sleep(0.05)
    desk.close(timeout_s=PATIENCE_S)
    headinfer.detach(model)
    assert len(list(tmp_path.iterdir())) == 1
