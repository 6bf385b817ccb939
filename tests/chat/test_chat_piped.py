"""`headinfer chat` with lines that are piped to it: answers, commands, errors."""

import json
import re
from types import SimpleNamespace

import pytest

from saved_models import save_llama

SMALL = ("--device", "simulated", "--tile-tokens", 16, "--chunk-tokens", 32)
FIRST, SECOND, THIRD = "w7 w14 w21 w28 w35", "w3 w5", "w11 w2 w4"


def read_tokens(outcome) -> list[tuple[int, int]]:
    """Return how many tokens each `/stats` says were read, and of how many."""
    pattern = r"([\d,]+) of ([\d,]+) tokens were read"
    return [(int(read), int(of)) for read, of in re.findall(pattern, outcome.err)]


@pytest.mark.parametrize("options", [(), SMALL], ids=["cpu", "simulated"])
def test_answers_are_stocks_and_only_what_is_new_is_read(chat, conversed, options):
    lines = (FIRST, "/stats", SECOND, "/stats", THIRD, "/stats")
    done = chat(*lines, options=options)
    assert done.code == 0
    assert done.answers == conversed(FIRST, SECOND, THIRD)
    first, second, third = read_tokens(done)
    assert first == (7, 7)
    # The newest token of an answer was never read, and <user>, words and <assistant> follow.
    assert second == (1 + 4, first[1] + 6 + 4)
    assert third == (1 + 5, second[1] + 6 + 5)
    assert done.rows("conversation")[-1].startswith("6 messages")


def test_a_file_comes_before_the_next_message_only(chat, conversed, tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other file.txt"
    one.write_text(f"{FIRST}\n")
    other.write_text(f"{THIRD}\n\n")
    done = chat(f"/file {one}", f"/file '{other}'", SECOND, SECOND)
    assert done.answers == conversed(f"{FIRST}\n{THIRD}\n\n{SECOND}", SECOND)
    assert "one.txt: 18 characters come before your next message" in done.err


def test_files_of_the_command_line_come_before_the_first_message(chat, conversed, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(FIRST)
    done = chat(SECOND, options=("--prompt-file", book))
    assert done.answers == conversed(f"{FIRST}\n\n{SECOND}")


def test_the_answer_is_that_of_generate(chat, verb, chat_llama, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(FIRST)
    sampling = ("--temperature", 1.3, "--top-k", 20, "--seed", 5, "-n", 6)
    args = ("--model", chat_llama, *sampling)
    plain = verb("generate", *args, "-f", book, "-p", SECOND)
    done = verb("chat", *args, stdin=f"/file {book}\n{SECOND}\n".encode())
    assert done.out == plain.out


def test_errors_are_one_line_each_and_the_conversation_goes_on(chat, conversed, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    lines = (
        FIRST, "/nothing", "/file", f"/file {tmp_path}/missing", f"/file {empty}", b"w1 \xff w2",
        "/clear now", f"/load {tmp_path}/none", "", "   ", SECOND,
    )  # fmt: skip
    done = chat(*lines)
    assert done.code == 2
    assert done.answers == conversed(FIRST, SECOND)
    assert len(done.errors) == 7
    told = "\n".join(done.errors)
    for part in (
        "no command /nothing; /help lists them",
        "/file needs a path: /file PATH",
        "missing' cannot be read: No such file",
        "empty.txt' is empty",
        "stdin is not UTF-8 text: byte 0xff at offset 3",
        "/clear takes nothing, and was given 'now'",
        "none' is not there",
    ):
        assert part in told


def test_a_message_may_begin_with_the_mark_of_commands(chat, conversed):
    assert chat(f"//w1 {SECOND}").answers == conversed(f"/w1 {SECOND}")


def test_a_conversation_beyond_the_models_positions_is_refused(chat, conversed):
    done = chat(FIRST, " ".join(["w1"] * 600), SECOND)
    assert done.code == 2
    (line,) = done.errors
    assert "would have 615 tokens" in line
    assert "made for 512 positions; /clear begins anew" in line
    assert done.answers == conversed(FIRST, SECOND)


def test_clearing_begins_anew_and_leaves_the_system(chat, conversed):
    done = chat("/system w9", FIRST, "/clear", "/stats", FIRST, "/system")
    (answer,) = conversed(FIRST, system="w9")
    assert done.answers == [answer, answer]
    assert done.rows("conversation") == ["0 messages, 0 tokens in the cache"]
    assert done.err.splitlines()[-1] == "w9"


def test_what_the_system_says_can_be_given_and_changed(chat, conversed):
    done = chat(FIRST, "/system w8", SECOND, options=("--system", "w9"))
    (first,) = conversed(FIRST, system="w9")
    assert done.answers[0] == first
    assert done.answers[1] != conversed(FIRST, SECOND, system="w9")[1]


STRICT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ '<user> ' if message['role'] == 'user' else '<assistant> ' }}{{ message['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def strict_llama(tmp_path):
    folder = save_llama(tmp_path / "strict", chat=True)
    (folder / "chat_template.jinja").write_text(STRICT)
    return folder


def test_a_system_that_the_template_refuses_changes_nothing(chat, strict_llama):
    plain = chat(FIRST, model=strict_llama)
    done = chat("/system w9", FIRST, "/system", model=strict_llama)
    assert done.code == 2
    assert done.answers == plain.answers
    assert "no system here" in done.errors[0]
    assert done.err.splitlines()[-1] == "the system says nothing"
    refused = chat(FIRST, model=strict_llama, options=("--system", "w9"))
    assert (refused.code, refused.out, len(refused.errors)) == (2, "", 1)


def test_a_model_without_template_converses_raw_alone(chat, verb, tmp_path):
    model = save_llama(tmp_path / "plain")
    refused = chat(FIRST, model=model)
    assert (refused.code, refused.out) == (2, "")
    assert "has no chat template" in refused.errors[0]
    assert "--raw" in refused.errors[0]
    done = chat(FIRST, SECOND, model=model, options=("--raw",))
    generate = ("generate", "--model", model, "--no-do-sample", "-n", 6, "-p")
    first = verb(*generate, FIRST).out.rstrip("\n")
    assert done.answers == [first, verb(*generate, f"{FIRST}{first}\n{SECOND}").out.rstrip("\n")]


def test_an_answer_that_is_cut_off_by_its_length_is_told(chat):
    done = chat(FIRST, tokens=2)
    assert "the answer ends at its 2 tokens (--max-new-tokens)" in done.err
    assert "--max-new-tokens" not in chat(FIRST, tokens=2, options=("--quiet",)).err


def test_a_failure_in_the_middle_of_the_model_costs_one_message(chat, conversed, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    calls = []

    def fail_once(self, *args, **keywords):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaMLP, "forward", fail_once)
    failing = 0
    chat(FIRST)
    failing = len(calls) + 1
    calls.clear()
    done = chat(FIRST, THIRD, "/stats", SECOND)
    assert done.code == 1
    assert "out of memory" in done.errors[0]
    assert done.answers == conversed(FIRST, SECOND)
    assert done.rows("conversation") == ["2 messages, 0 tokens in the cache"]


def test_what_was_cut_off_is_no_part_of_the_cache(chat, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = save_llama(tmp_path / "plain")
    plain = chat(f"{FIRST} {SECOND}", model=model, options=("--raw",))
    forward, calls = LlamaMLP.forward, []

    def fail_in_the_second_layer(self, *args, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return forward(self, *args, **keywords)

    monkeypatch.setattr(LlamaMLP, "forward", fail_in_the_second_layer)
    done = chat(FIRST, f"{FIRST} {SECOND}", model=model, options=("--raw",))
    assert len(done.errors) == 1
    assert done.answers == plain.answers


def test_a_seed_is_for_the_conversation_and_not_for_each_answer(chat):
    lines = (FIRST, "/clear", FIRST, "/clear", FIRST)
    options = ("--do-sample", "--temperature", 5.0, "--seed", 3)
    first, again = (
        chat(*lines, options=options, tokens=12, greedy=False).answers for _ in range(2)
    )
    assert first == again
    assert len(set(first)) > 1


def test_help_names_all_commands(chat):
    from headinfer.cli.talk.commands import COMMANDS

    told = chat("/help").err
    assert set(COMMANDS) == {"file", "save", "load", "stats", "system", "clear", "help", "exit"}
    for name, command in COMMANDS.items():
        assert re.search(rf"^/{name} .*{re.escape(command.help)}$", told, flags=re.MULTILINE)


def test_leaving_leaves_the_rest_unread(chat, conversed):
    assert chat(FIRST, "/exit", SECOND).answers == conversed(FIRST)


def test_stdin_that_was_closed_is_told(chat, monkeypatch, capsys):
    import typer

    from headinfer.cli.main import app

    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(SystemExit) as ended:
        typer.main.get_command(app)(["chat"])
    assert ended.value.code == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_a_saved_conversation_goes_on_elsewhere(chat, conversed, tmp_path):
    session = tmp_path / "talk.hsession"
    saved = chat("/system w9", FIRST, SECOND, f"/save {session}")
    assert saved.code == 0
    done = chat(f"/load {session}", THIRD, "/stats", "/system", options=SMALL)
    assert [*saved.answers, *done.answers] == conversed(FIRST, SECOND, THIRD, system="w9")
    ((read, of),) = read_tokens(done)
    assert read == 1 + 5
    assert of == 28
    assert re.search(r"session \S*talk.hsession: \d+ tokens, 4 messages", done.err)
    assert done.err.splitlines()[-1] == "w9"


def test_sessions_of_the_command_line_are_loaded_and_saved(chat, conversed, tmp_path):
    session = tmp_path / "talk.hsession"
    first = chat(FIRST, options=("--save-session", session))
    both = ("--session", session, "--save-session", session)
    second = chat(SECOND, options=both)
    third = chat(THIRD, "/stats", options=both)
    answers = [*first.answers, *second.answers, *third.answers]
    assert answers == conversed(FIRST, SECOND, THIRD)
    assert read_tokens(third)[0][0] == 1 + 5


def test_a_session_of_generate_serves_what_begins_alike(
    chat, verb, conversed, chat_llama, tmp_path
):
    session = tmp_path / "book.hsession"
    args = ("--model", chat_llama, "--no-do-sample", "-n", 6, "--save-session", session)
    verb("generate", *args, "-p", FIRST)
    done = chat(f"/load {session}", f"{FIRST} w1", "/stats")
    assert "no messages, so it serves what begins alike" in done.err
    assert done.answers == conversed(f"{FIRST} w1")
    assert read_tokens(done) == [(2, 8)]


def test_another_models_session_changes_nothing(chat, conversed, tmp_path):
    session = tmp_path / "other.hsession"
    other = save_llama(tmp_path / "other", chat=True, num_hidden_layers=3)
    chat(FIRST, f"/save {session}", model=other)
    done = chat(FIRST, f"/load {session}", SECOND, "/stats")
    assert done.code == 2
    assert "is of another model" in done.errors[0]
    assert done.answers == conversed(FIRST, SECOND)
    assert read_tokens(done) == [(5, 17)]  # nothing was read again


def test_a_damaged_session_is_read_again_where_it_must_be(chat, conversed, tmp_path):
    session = tmp_path / "talk.hsession"
    chat(FIRST, SECOND, f"/save {session}")
    (page,) = session.glob("*-0*.safetensors")
    content = bytearray(page.read_bytes())
    content[-1] ^= 1
    page.write_bytes(content)
    done = chat(f"/load {session}", THIRD)
    assert done.code == 0
    assert page.name in done.err
    assert done.answers == conversed(FIRST, SECOND, THIRD)[-1:]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[", "is not JSON"),
        ("[]", "is of another program"),
        ('{"kind": "headinfer messages", "format": 9}', "has format 9, and this version reads 1"),
        ('{"kind": "headinfer messages", "format": 1, "messages": [{}]}', "holds no messages"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(chat, conversed, tmp_path, text, why):
    session = tmp_path / "talk.hsession"
    chat(FIRST, f"/save {session}")
    (session / "messages.json").write_text(text)
    done = chat(FIRST, f"/load {session}", SECOND)
    assert done.code == 2
    assert why in done.errors[0]
    assert done.answers == conversed(FIRST, SECOND)


def test_a_session_without_room_is_told_before_a_message_is_read(
    chat, conversed, tmp_path, monkeypatch
):
    session = tmp_path / "talk.hsession"
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=20 * 256))
    options = ("--save-session", session)
    refused = chat(" ".join([FIRST] * 4), options=options)
    assert refused.answers == []
    assert "the session of 27 tokens needs" in refused.errors[0]
    assert not session.exists()
    done = chat(FIRST, SECOND, THIRD, options=options)
    assert done.answers == conversed(FIRST, SECOND, THIRD)
    (note,) = (line for line in done.err.splitlines() if line.startswith("note: "))
    assert note.endswith("free some, or choose another place; /save FOLDER saves it elsewhere")
    (error,) = done.errors
    assert "the first " in error
    assert "tokens were saved" in error


def test_nothing_is_saved_where_nothing_was_said_or_something_else_is(chat, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    done = chat(f"/save {tmp_path}/new", FIRST, f"/save {tmp_path}/full")
    assert done.code == 2
    assert "nothing was said yet" in done.errors[0]
    assert "has other things in it, such as 'letter.txt'" in done.errors[1]
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_messages_are_whole_where_they_cannot_be_written_again(chat, tmp_path, monkeypatch):
    session = tmp_path / "talk.hsession"
    chat(FIRST, f"/save {session}")
    before = json.loads((session / "messages.json").read_text())

    def full(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headinfer.saved.writer.os.fsync", full)
    done = chat(FIRST, SECOND, f"/save {session}")
    assert done.code == 2
    assert "No space left on device" in done.errors[0]
    assert json.loads((session / "messages.json").read_text()) == before
