"""Fresh processes: their answers, and their deaths."""

import multiprocessing.util
import os
import signal
import subprocess
import sys
import time

import pytest

from headinfer import folders
from headinfer.bench.child import ChildError, ask, ask_for_many
from headinfer.errors import OptionError


@pytest.mark.slow
def test_a_child_has_the_environment_of_its_caller(monkeypatch):
    for value in ("one", "two"):
        monkeypatch.setenv("HEADINFER_TEST", value)
        assert ask("answering", {"do": "answer"})["environment"] == value


@pytest.mark.slow
def test_a_program_that_does_not_expect_to_be_imported_can_ask(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from headinfer.bench.child import ask\n"
        "print(ask('answering', {'do': 'answer'})['question'])\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "{'do': 'answer'}\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no such signal")
@pytest.mark.parametrize("seconds", [0.5, 8.0], ids=["while it imports", "while it works"])
def test_an_interrupt_is_for_the_caller_alone(tmp_path, seconds):
    program = tmp_path / "program.py"
    program.write_text(
        "from headinfer.bench.child import ask\n"
        "print('asking', flush=True)\n"
        "try:\n"
        "    ask('answering', {'do': 'sleep'})\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    asking = subprocess.Popen(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert asking.stdout.readline() == "asking\n"
    time.sleep(seconds)
    os.killpg(asking.pid, signal.SIGINT)  # as a terminal does
    out, err = asking.communicate(timeout=180)
    assert (out, err) == ("interrupted\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="its semaphores have no names")
def test_a_death_beside_a_bar_leaves_no_semaphore(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from headinfer.bench import child\n"
        "child._PRELOADED = []  # torch, which takes its time\n"
        "try:\n"
        "    child.ask('answering', {'do': 'draw and die'})\n"
        "except child.ChildError as error:\n"
        "    print(error.returncode)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("-9\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="its folders have no modes")
def test_what_is_said_is_not_kept_where_others_can_read_it(tmp_path, monkeypatch):
    multiprocessing.util.get_temp_dir()  # Python's own, made once in a process: not in ours below
    tmp_path.chmod(0o777)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folders._temporary_folder.cache_clear()
    with pytest.raises(OptionError, match=r"can be written to by other users.*set TMPDIR"):
        ask("answering", {"do": "answer"})
    assert list(tmp_path.iterdir()) == []


def test_each_answer_comes_from_a_process_of_its_own(capfd):
    first, second = (ask("answering", {"do": "answer", "number": n}) for n in (1, 2))
    assert first["question"] == {"do": "answer", "number": 1}
    assert len({first["process"], second["process"], os.getpid()}) == 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("what", "status"), [("raise", 1), ("exit", 7), ("die", -signal.SIGKILL)])
def test_a_death_is_told_with_what_was_said(what, status):
    with pytest.raises(ChildError) as error:
        ask("answering", {"do": what})
    assert error.value.returncode == status
    assert "on stdout\non stderr\n" in error.value.stderr
    assert ("ValueError: it broke" in error.value.stderr) == (what == "raise")


def test_one_that_takes_too_long_is_ended():
    start_s = time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.5 s"):
        ask("answering", {"do": "sleep"}, time_limit_s=0.5)
    assert time.monotonic() - start_s < 40


def test_many_answers_come_from_one_process_as_they_are_given():
    given = list(ask_for_many("answering", {"many": 3}))
    assert [each["number"] for each in given] == [0, 1, 2]
    assert len({each["process"] for each in given}) == 1
    assert list(ask_for_many("answering", {"many": 0})) == []


def test_answers_before_a_death_are_kept():
    asking = ask_for_many("answering", {"many": 2, "do": "exit"})
    assert [next(asking)["number"] for _ in range(2)] == [0, 1]
    with pytest.raises(ChildError) as error:
        next(asking)
    assert error.value.returncode == 7


def test_a_process_ends_where_its_caller_has_enough():
    asking = ask_for_many("answering", {"many": 2, "do": "sleep"})
    process = next(asking)["process"]
    asking.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
