"""Files that verbs write: checked before any work, and otherwise left as they are."""

import json
import os
import subprocess

import pytest
from test_cli_bad_input import check

PLAN = ("plan", "--context", "8K")


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_link_that_leads_nowhere_is_written_through(cli, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to("target.json")
    check(cli(*PLAN, "--model", "no-such-preset", "--json", link), "no-such-preset")
    assert link.is_symlink()
    assert names(tmp_path) == ["link.json"]
    assert cli(*PLAN, "--json", link).code == 0
    assert link.is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())


def test_links_to_where_nothing_can_be_written_are_refused(cli, tmp_path):
    (tmp_path / "lost").symlink_to("no/such/folder/out.json")
    (tmp_path / "circle").symlink_to("circle")
    check(cli(*PLAN, "--json", tmp_path / "lost"), "no folder")
    check(cli(*PLAN, "--json", tmp_path / "circle"), "may not be written")
    check(cli(*PLAN, "--json", ""), "--json ''")
    assert names(tmp_path) == ["circle", "lost"]


def test_what_was_written_before_stays_until_there_is_something_new(cli, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("mine")
    check(cli(*PLAN, "--model", "no-such-preset", "--json", file), "no-such-preset")
    assert file.read_text() == "mine"


def test_a_pipe_is_not_opened_before_there_is_something_to_write(cli, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check(cli(*PLAN, "--model", "no-such-preset", "--json", pipe), "no-such-preset")


@pytest.mark.parametrize("verb", [("generate", "-p", "w1", "--trace"), ("roofline", "--plot")])
def test_only_json_is_for_stdout(cli, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    check(cli(*verb, "-"), verb[-1], "only --json")
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_disk_is_one_line(cli):
    done = cli(*PLAN, "--json", "/dev/full")
    assert done.code == 2
    assert done.error_lines == [
        "headinfer: error: '/dev/full' cannot be written (No space left on device)"
    ]


def run_closed(command, closed: str, *args) -> subprocess.CompletedProcess:
    """Run a verb without one of its streams, as a shell does for `>&-`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command[0], *map(str, args)],
        env=command[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_json_for_a_closed_stdout_is_an_error(command):
    done = run_closed(command, ">&-", *PLAN, "--json")
    assert done.returncode == 2
    assert done.stderr == "headinfer: error: stdout did not take the JSON: Bad file descriptor\n"


def test_an_error_for_a_closed_stderr_is_its_exit_code(command):
    done = run_closed(command, "2>&-", "plan", "--context", "many")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("args", [("plan",), ("roofline",), ("--version",), ("bench", "methods")])
def test_what_a_closed_stdout_does_not_show_is_not_silent(command, args):
    done = run_closed(command, ">&-", *args)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("headinfer: error: the output cannot be written: Bad file descriptor")


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("verb", ["plan", "roofline"])
def test_a_result_for_a_file_is_not_lost_with_stdout(command, tmp_path, verb):
    file = tmp_path / "out.json"
    assert run_closed(command, ">&-", verb, "--json", file).returncode == 1
    assert json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--json",)], ids=["text", "json"])
def test_statistics_are_told_without_a_stdout(command, llama, prompt, flags):
    done = run_closed(command, ">&-", "generate", "-m", llama, "-p", prompt, "-n", 3, *flags)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "prefill" in done.stderr
    what = "the JSON" if flags else "all of the text"
    last = done.stderr.splitlines()[-1]
    assert last == f"headinfer: error: stdout did not take {what}: Bad file descriptor"


@pytest.mark.parametrize("verb", ["bench", "evaluate"])
def test_reports_tell_first_that_there_are_no_results(cli, tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    done = cli(verb, "report", "nope.json")
    assert done.code == 2
    (line,) = done.error_lines
    assert "'nope.json'" in line
    assert "are not there" in line


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("columns", ["80", "130", "", "0", "many"])
@pytest.mark.parametrize(
    "args",
    [
        ("plan", "--model", "llama-3-8b", "--context", "128K"),
        ("plan", "--model", "llama-3-70b", "--context", "128K", "--gpus", "4"),
        ("bench", "methods"),
    ],
    ids=["plan", "plan of GPUs", "methods"],
)
def test_lines_in_a_pipe_are_as_long_as_columns_says_and_not_padded(
    cli, monkeypatch, args, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    lines = cli(*args).out.splitlines()
    longest = max(map(len, lines))
    most = int(columns) if columns in ("80", "130") else 100
    assert most - 20 < longest <= most
    assert [line for line in lines if line != line.rstrip()] == []
