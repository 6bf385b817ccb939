"""`headinfer roofline`."""

import json
import subprocess
import sys

import pytest

from headinfer.probe.keep import save_measurement
from measurements import CPU_ONLY, measured_here

ROW_KEYS = {
    "phase", "operator", "context_tokens", "query_heads", "kv_heads", "operations", "device",
    "offloaded",
}  # fmt: skip
ROOF_KEYS = {"bytes", "intensity_flops_per_byte", "attainable_flops_per_s", "bound"}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Let this machine have been measured: a CPU without a link."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_measurement(measured_here(CPU_ONLY))


def words(line: str) -> str:
    return " ".join(line.split())


def test_tables_of_80_columns(cli):
    done = cli("roofline")
    assert (done.code, done.err) == (0, "")
    lines = list(map(words, done.out.splitlines()))
    assert "flash 1K 17.2G 21.0M 819 165T compute 4.19M 4096 102T link" in lines
    assert "head-wise 100K 21.5T 262M 81920 165T compute 52.4M 409600 165T compute" in lines
    assert "flash 100K 1.68G 419M 4.00 4.00T memory 419M 4.00 100G link" in lines
    assert "chunks of 1,650 tokens" in done.out
    assert "40 times slower" in done.out
    assert "data sheet" in done.out
    table = [line for line in done.out.splitlines() if line.startswith(("flash  ", "head-wise  "))]
    assert len(table) == 12
    assert max(map(len, table)) <= 80
    assert [line for line in done.out.splitlines() if line.endswith(" ")] == []


def test_other_contexts_in_order_and_once(cli):
    done = cli("roofline", "--contexts", "1M, 4K,4096", "--hardware", "h200", "--causal")
    assert done.code == 0
    tokens = [line.split()[1] for line in done.out.splitlines() if line.startswith("flash  ")]
    assert tokens == ["4K", "1M"] * 2
    assert "causal mask leaves" in done.out


def test_paper_beside_ours_with_reasons(cli):
    done = cli("roofline", "--paper")
    assert done.code == 0
    lines = list(map(words, done.out.splitlines()))
    assert any("17M / 4.21M 1 / 3.98 1T / 3.98T memory a" in line for line in lines)
    assert any("5.2M / 5.24M 41000 / 40960 312T / 165T compute c" in line for line in lines)
    assert any("0.5M / 524K 4100 / 4096 102T / 102T memory / link d" in line for line in lines)
    for reason in ("query heads", "13 GB/s", "A100", "name the link"):
        assert reason in done.out


@pytest.mark.parametrize(
    "args",
    [
        ("--hardware", "a100-80gb"),
        ("--model", "demo"),
        ("--contexts", "1K"),
        ("--causal",),
    ],
)
def test_paper_has_one_machine_model_and_set_of_contexts(cli, args):
    done = cli("roofline", "--paper", *args)
    assert (done.code, done.out) == (2, "")
    assert len(done.error_lines) == 1
    assert f"leave {args[0]} out" in done.err


def test_this_machine_has_to_be_measured_first(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = cli("roofline", "--hardware", "this")
    assert (done.code, done.out) == (2, "")
    assert len(done.error_lines) == 1
    assert "run `headinfer probe` first" in done.err


def test_without_a_link_nothing_is_copied(cli, measured):
    done = cli("roofline", "--hardware", "this")
    assert done.code == 0
    assert "nothing is copied" in done.out
    assert "ceilings (measured)" in done.out
    assert "link\n" not in done.out
    rows = json.loads(cli("roofline", "--hardware", "this", "--json").out)["rows"]
    assert all(row["offloaded"] is None for row in rows)


@pytest.mark.parametrize("args", [("--json",), ("--json", "-"), ("--json", "--contexts", "1K")])
def test_json_alone_on_stdout(cli, args):
    done = cli("roofline", *args)
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert set(document) == {"model", "hardware", "causal", "link_hidden_from_tokens", "rows"}
    assert document["model"]["query_heads"] == 32
    assert document["hardware"]["matmul_flops_per_s"] == 165e12
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["device"]) == set(row["offloaded"]) == ROOF_KEYS
    first = document["rows"][0]
    assert (first["phase"], first["operator"]) == ("prefill", "flash attention")
    assert first["offloaded"]["bound"] == "link"


def test_json_to_a_file_beside_the_tables(cli, tmp_path):
    path = tmp_path / "roofline.json"
    done = cli("roofline", "--paper", "--json", path)
    assert done.code == 0
    assert "paper / ours" in done.out
    assert str(path) in done.err.replace("\n", "")
    paper = json.loads(path.read_text())["paper"]
    assert len(paper) == 12
    cell = paper[-1]["cells"][-2]
    assert (cell["paper"], cell["ours"]) == ("13G", 100e9)
    assert "13 GB/s" in cell["reason"]


@pytest.mark.slow
def test_plot_to_a_file(cli, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    done = cli("roofline", "--plot", path)
    assert done.code == 0, done.err
    assert "</svg>" in path.read_text()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--plot", "/no/such/folder/a.png"), "no folder"),
        (("--plot", "a.gif"), ".png, .svg, .pdf"),
        (("--plot", "a"), ".png, .svg, .pdf"),
        (("--plot", "."), "is a folder"),
        (("--json", "/no/such/folder/a.json"), "no folder"),
        (("--hardware", "abacus"), "use one of rtx-4090"),
        (("--contexts", "1K,many"), "'many' is not a token count"),
        (("--contexts", ","), "names none"),
        (("--contexts", "1K,,2K"), "a comma too many"),
        (("--hardware", "h200", "--hardware", "h100"), "--hardware is given 2 times"),
        (("--contexts", "0"), "positive"),
    ],
)
def test_bad_input_is_one_line_before_any_work(cli, monkeypatch, args, reason):
    def never(*_args, **_kwargs):
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr("headinfer.cli.roofline.roofline_rows", never)
    done = cli("roofline", *args)
    assert (done.code, done.out) == (2, "")
    assert len(done.error_lines) == 1
    assert reason in done.err


def test_a_plot_without_matplotlib_names_the_remedy(cli, monkeypatch):
    monkeypatch.setattr("headinfer.plot.files.find_spec", lambda _name: None)
    done = cli("roofline", "--plot", "a.png")
    assert done.code == 2
    assert done.error_lines == [
        "headinfer: error: --plot needs matplotlib; install it with: pip install matplotlib"
    ]


def test_neither_torch_nor_matplotlib_is_imported_for_tables(command):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from headinfer.cli.main import app\n"
        "assert CliRunner().invoke(app, ['roofline', '--paper']).exit_code == 0\n"
        "print([n for n in ('torch', 'transformers', 'matplotlib') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=command[1], capture_output=True, text=True, timeout=180
    )
    assert done.stdout == "[]\n", done.stderr
