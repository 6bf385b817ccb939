"""Slots that are saved and restored over HTTP, and what the command line makes of them."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import tiny_server
from server_parts import act, ask, cached, text_of

from headinfer.saved.folder import holding
from saved_models import save_llama

TEXT = " ".join(f"w{number % 90}" for number in range(0, 3000, 7))
MORE = " ".join(f"w{number % 90}" for number in range(0, 1000, 11))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(
        tmp_path_factory.mktemp("kept"), chat=True, eos_token_id=None, positions=2**16
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def keeper(folder, place):
    """A server with a folder of sessions."""
    with tiny_server(folder, session_folder=place) as server:
        yield server


@pytest.fixture
def command_line(folder):
    """Run `headinfer generate` in this process."""
    from typer.testing import CliRunner

    from headinfer.cli.main import app

    def run(*args: object) -> Any:
        options = ("--model", folder, "--device", "cpu", "--no-do-sample", "-n", 4)
        done = CliRunner().invoke(app, ["generate", *map(str, options), *map(str, args)])
        assert done.exit_code == 0, done.stderr
        return done

    return run


def test_a_slot_is_saved_and_the_command_line_goes_on_with_it(keeper, command_line, place) -> None:
    answer = ask(keeper, TEXT)
    said = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": text_of(answer)}]
    saved = act(keeper, "save", answer["id_slot"], "book.hsession", messages=said)
    assert saved.status_code == 200, saved.text
    told = saved.json()
    tokens = answer["usage"]["prompt_tokens"] + 3  # the last one was not read
    assert (told["id_slot"], told["filename"]) == (answer["id_slot"], "book.hsession")
    assert told["n_saved"] == tokens
    assert told["n_written"] > 0
    (listed,) = keeper.get("/sessions").json()["data"]
    assert (listed["filename"], listed["tokens"]) == ("book.hsession", tokens)
    assert listed["conversation"] is True
    done = command_line("-p", TEXT, "--session", place / "book.hsession")
    assert done.stdout.strip() == text_of(answer)
    assert f"{tokens - 3 - 1:,} of the prompt's" in done.stderr


def test_what_the_command_line_saved_is_restored(keeper, command_line, place) -> None:
    prompt = MORE
    done = command_line("-p", prompt, "--save-session", place / "mine")
    restored = act(keeper, "restore", 0, "mine")
    assert restored.status_code == 200, restored.text
    told = restored.json()
    assert told["n_read"] > 0
    assert told["messages"] == []
    slots = {slot["id"]: slot for slot in keeper.slots()}
    assert slots[told["id_slot"]]["tokens"] == told["n_restored"]
    answer = ask(keeper, prompt)
    assert text_of(answer) == done.stdout.strip()
    assert cached(answer) == answer["usage"]["prompt_tokens"] - 1


def test_a_conversation_comes_back_with_its_messages(keeper) -> None:
    first = ask(keeper, MORE, "w5", "w6 w7")
    roles = ("system", "user", "assistant")
    said = [
        {"role": role, "content": text}
        for role, text in zip(roles, ("w1", MORE, "w5"), strict=True)
    ]
    assert act(keeper, "save", first["id_slot"], "talk", messages=said).status_code == 200
    restored = act(keeper, "restore", 0, "talk").json()
    assert restored["messages"] == said
    assert restored["id_slot"] == first["id_slot"]  # which is kept and has all of it
    assert act(keeper, "save", first["id_slot"], "talk").status_code == 200
    assert act(keeper, "restore", 0, "talk").json()["messages"] == []


@pytest.mark.covering
@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../out", "/tmp/out", "a/b", "a\\b", "c:x", ".hidden", "a\0b", "n" * 101),
        *("0123456789abcdef.hsession", "link"),
    ],
)
@pytest.mark.parametrize("action", ["save", "restore"])
def test_a_name_that_leaves_the_folder_is_refused(keeper, place, name: str, action: str) -> None:
    if name == "link" and not (place / name).is_symlink():
        (place / name).symlink_to(place.parent)
    slot = ask(keeper, MORE)["id_slot"]
    before = sorted(place.parent.iterdir())
    refused = act(keeper, action, slot, name)
    assert refused.status_code == 400
    assert "name" in refused.json()["error"]["message"] or "leads out" in refused.text
    assert sorted(place.parent.iterdir()) == before


def test_what_keeps_a_slot_from_being_saved_has_its_own_status(keeper, place, monkeypatch) -> None:
    slot = ask(keeper, MORE)["id_slot"]
    assert act(keeper, "save", slot, "held").status_code == 200
    (place / "other").mkdir()
    (place / "other" / "letter.txt").write_text("dear")
    refused = act(keeper, "save", slot, "other")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "filename")
    with holding(place / "held", alone=True):
        for action in ("save", "restore"):
            assert act(keeper, action, slot, "held").status_code == 409
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=0))
        refused = act(keeper, "save", slot, "held")
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
    assert "are free where" in refused.json()["error"]["message"]
    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", lambda _file: (_ for _ in ()).throw(OSError(5, "I/O error")))
        assert act(keeper, "save", slot, "held").status_code == 500
    assert act(keeper, "restore", 0, "held").status_code == 200


@pytest.mark.parametrize("relative", [False, True])
def test_an_error_names_the_session_and_not_where_the_server_keeps_it(
    folder, tmp_path, monkeypatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "kept"
    told = []
    with tiny_server(folder, session_folder="kept" if relative else place) as server:
        slot = ask(server, MORE)["id_slot"]
        (place / "other").mkdir()
        (place / "other" / "letter.txt").write_text("dear")
        (place / "file").write_text("")
        assert act(server, "save", slot, "held").status_code == 200
        (place / "damaged").mkdir()
        (place / "damaged" / "index.json").write_text("{")
        with holding(place / "held", alone=True):
            told += [act(server, action, slot, "held") for action in ("save", "restore")]
        told += [act(server, "save", slot, name) for name in ("other", "file")]
        told += [act(server, "restore", 0, name) for name in ("nowhere", "other", "damaged")]
        with monkeypatch.context() as full:
            full.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=0))
            told.append(act(server, "save", slot, "held"))
        place.rename(tmp_path / "away")
        told.append(act(server, "save", slot, "held"))
    errors = [answer.json()["error"]["message"] for answer in told]
    assert not [error for error in errors if str(tmp_path) in error or "kept/" in error]
    names = ("held", "held", "other", "file", "nowhere", "other", "damaged", "held", "held")
    for name, error in zip(names, errors, strict=True):
        assert f"'{name}'" in error
    assert [answer.status_code for answer in told] == [409, 409, *[400] * 5, 507, 400]


def test_a_session_has_one_slot_whatever_others_are_called(keeper) -> None:
    slot = ask(keeper, MORE)["id_slot"]
    for name in ("tale", "tale.hsession"):
        assert act(keeper, "save", slot, name).status_code == 200
    ids = [each["id"] for each in keeper.slots()]
    assert len(set(ids)) == len(ids)
    assert "tale" not in ids
    again = act(keeper, "save", "tale.hsession", "again")
    assert again.status_code == 200, again.text


def test_what_is_not_there_is_told(keeper, place) -> None:
    slot = ask(keeper, MORE)["id_slot"]
    for path, body in (
        ("/slots/none?action=save", {"filename": "x"}),
        ("/slots/0?action=restore", {"filename": "nowhere"}),
        (f"/slots/{slot}?action=burn", {"filename": "x"}),
        (f"/slots/{slot}?action=save", {}),
        (f"/slots/{slot}", {"filename": "x"}),
    ):
        refused = keeper.post(path, **body)
        assert refused.status_code == 400, path
    unanswered = [{"role": "user", "content": "w1"}]
    assert act(keeper, "save", slot, "x", messages=unanswered).status_code == 400
    assert not (place / "x").exists()


def test_without_a_folder_it_says_how_to_have_one(folder) -> None:
    with tiny_server(folder) as server:
        refused = act(server, "restore", 0, "x")
        assert refused.status_code == 400
        assert "--session-folder" in refused.json()["error"]["message"]
        assert server.get("/sessions").json()["enabled"] is False
