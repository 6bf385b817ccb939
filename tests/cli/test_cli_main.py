"""What holds for all verbs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_help_names_the_verbs(cli):
    done = cli("--help")
    assert done.code == 0
    for verb in ("generate", "demo", "roofline", "heads"):
        assert verb in done.out


def test_no_verb_shows_the_help(cli):
    done = cli()
    assert done.code == 0
    assert "generate" in done.out


def test_generate_help_has_every_option(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = cli("generate", "--help").out
    for flag in (
        "--model", "--prompt-file", "--prompt", "--raw", "--seed", "--dtype", "--device",
        "--device-memory", "--host-memory", "--chunk-tokens", "--tile-heads", "--tile-tokens",
        "--no-overlap", "--no-capture", "--local-files-only", "--trust-remote-code", "--json",
        "--quiet",
        "--max-new-tokens", "--no-do-sample", "--temperature", "--top-k", "--top-p", "--min-p",
        "--repetition-penalty", "--num-beams", "--prompt-lookup", "--draft", "--assistant",
    ):  # fmt: skip
        assert f" {flag} " in text


@pytest.mark.parametrize("verb", [("generate",), ("demo",)])
def test_switches_can_be_turned_off(cli, verb):
    text = cli(*verb, "--help").out
    assert "--no-overlap" in text
    assert "--no-capture" in text


def test_version(cli):
    import headinfer

    done = cli("--version")
    assert (done.code, done.out) == (0, f"headinfer {headinfer.__version__}\n")


@pytest.mark.parametrize("text", [None, "in another language"])  # as libraries may translate it
@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ("generatee", "commands"),
        ("bench decodee", "commands"),
        ("-- generatee", "commands"),
        ("--nothing", "options"),
        ("bench --nothing", "options"),
        ("plan --nothing", "options"),
    ],
)
def test_wrong_usage_is_told_with_what_lists_the_right_words(
    cli, monkeypatch, written, listed, text
):
    if text is not None:
        monkeypatch.setattr("headinfer.cli.main.told", lambda _error, _given: text)
    done = cli(*written.split())
    assert done.code == 2
    assert f"(--help lists the {listed})" in done.err.replace("\n", " ")
    assert (text or written.split()[-1]) in done.err


def test_bench_has_verbs_of_its_own(cli):
    done = cli("bench", "--help")
    assert done.code == 0
    assert "headinfer bench" in done.out
    assert "decode" in done.out
    assert "--context" in cli("bench", "decode", "--help").out
    assert cli("bench").out == done.out
    wrong = cli("bench", "decode", "--no-such-option")
    assert wrong.code == 2
    assert len(wrong.error_lines) == 1


def test_options_of_benchmarks_are_given_once(cli):
    done = cli("bench", "decode", "--context", "1K", "--contexts", "2K")
    assert (done.code, len(done.error_lines)) == (2, 1)
    assert "--contexts/--context is given 2 times" in done.err


def test_help_and_version_import_no_torch(command):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from headinfer.cli.main import app\n"
        "for args in ['--help'], ['--version'], ['generate', '--help'], ['chat', '--help'], [\n"
        "    'bench', '--help'], ['evaluate', '--help'], ['evaluate', 'needle', '--help'\n"
        "]:\n"
        "    assert CliRunner().invoke(app, args).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=command[1], capture_output=True, text=True, timeout=180
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(command, llama, prompt):
    script = '"$@" | true; exit "${PIPESTATUS[0]}"'
    args = [*command[0], "generate", "--model", str(llama), "-p", prompt, "-n", "50", "--quiet"]
    done = subprocess.run(
        ["bash", "-c", script, "bash", *args],
        env=command[1],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 1
    assert done.stderr == ""


VERBS = [
    *([verb] for verb in ("generate", "chat", "demo", "plan", "probe", "roofline", "heads")),
    *(["bench", verb] for verb in ("decode", "prefill", "memory", "max-context", "ablation")),
    *(["evaluate", verb] for verb in ("agreement", "needle", "figure7", "ruler", "scbench")),
]


@pytest.mark.covering
@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_is_whole_and_has_panels_with_names(cli, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = cli(*verb, "--help").out
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "─ Options ─" not in text
    assert "<bool>" not in text
    shown = panels(text)
    assert [name for name in ORDER if name in shown] == shown[-len(set(shown) & set(ORDER)) :]


ORDER = ["Model", "Generation", "Output", "Memory", "Research"]


def panels(text: str) -> list[str]:
    """Return the first words of the panels' names."""
    return re.findall(r"^╭─ (\w+)", text, flags=re.MULTILINE)


def test_options_stand_in_the_order_of_who_needs_them(cli):
    text = cli("generate", "--help").out
    assert panels(text) == ["Prompt", *ORDER]
    places = [text.index(f" {flag} ") for flag in ("--prompt", "--temperature", "--tile-heads")]
    assert places == sorted(places)
    research = text.index("─ Research")
    assert text.index("--device-memory") < research < text.index("--no-overlap")


FULL = Path("/dev/full")


@pytest.mark.covering(most=2)
@pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")
@pytest.mark.parametrize(
    "args",
    [("plan",), ("plan", "--json"), ("roofline", "--json"), ("--version",), ("plan", "--help")],
    ids=" ".join,
)
def test_a_full_disk_is_told_in_one_line(command, args):
    environment = {name: value for name, value in command[1].items() if name != "PYTHONUNBUFFERED"}
    with FULL.open("w") as full:
        done = subprocess.run(
            [*command[0], *args], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("headinfer: error: the output cannot be written: No space left")
