"""`headinfer probe` as users run it; the measuring is made up but for one quick run."""

import json
import os
from dataclasses import replace

import pytest

from headinfer.plan import measured
from headinfer.plan.measurement import Quantity, Rate
from headinfer.probe import keep
from measurements import CPU_ONLY, WITH_GPU, failing


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measuring(monkeypatch):
    """Make every probe find the same, and note what it was asked."""
    asked = []

    def use(measurement):
        def run_probe(device, dtype, effort, progress):
            asked.append((device.name, str(dtype), effort.quick))
            progress(Quantity.MATMUL, None, 0, 1)
            return measurement

        monkeypatch.setattr("headinfer.probe.run.run_probe", run_probe)
        return asked

    return use


def rows(text: str) -> list[str]:
    """Lines with single spaces between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.slow
def test_a_quick_probe_of_this_machine(process):
    folder = os.environ["XDG_CACHE_HOME"]
    done = process("probe", "--quick", "--device", "cpu", XDG_CACHE_HOME=folder)
    assert (done.code, done.err) == (0, "")
    kept = measured.read_measurement()
    assert kept.quick
    assert measured.load_measured().measured
    assert kept.identity.cpu in done.out
    assert "attention, decode" in done.out
    assert kept.host_kernel in done.out
    assert f"kept in {measured.measurement_path()}" in done.out


def test_the_table_has_a_row_for_each_rate(cli, measuring):
    measuring(WITH_GPU)
    done = cli("probe", "--device", "cpu")
    assert done.code == 0
    lines = rows(done.out)
    assert "matrix products 500 GFLOP/s - a way" in lines
    assert "attention, decode 128K 600 GB/s 60% a way" in lines
    assert "attention, on CPU 8K 12.0 GB/s 48% a way" in lines
    assert "link, to GPU 256 KiB 8.00 GB/s 32% a way" in lines
    assert "busy" not in done.out
    assert "a GPU, 24.00 GiB of memory, 20.00 GiB free" in done.out
    assert measured.read_measurement() == WITH_GPU


@pytest.mark.parametrize(
    ("args", "asked"),
    [
        ((), ("cpu", "torch.bfloat16", False)),
        (("--quick", "--dtype", "float32"), ("cpu", "torch.float32", True)),
    ],
)
def test_options(cli, measuring, monkeypatch, args, asked):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    seen = measuring(CPU_ONLY)
    assert cli("probe", *args).code == 0
    assert seen == [asked]


def test_json_to_a_file(cli, measuring, tmp_path):
    measuring(CPU_ONLY)
    path = tmp_path / "out.json"
    done = cli("probe", "--device", "cpu", "--json", path)
    assert done.code == 0
    assert measured.from_json(json.loads(path.read_text())) == CPU_ONLY
    assert f"written to {path}" in done.out
    assert "matrix products" in done.out


@pytest.mark.parametrize("path", [("-",), ()], ids=["-", "bare"])
def test_json_alone_on_stdout(cli, measuring, path):
    measuring(CPU_ONLY)
    done = cli("probe", "--device", "cpu", "--json", *path)
    assert measured.from_json(json.loads(done.out)) == CPU_ONLY
    assert "matrix products" in done.err
    assert measured.read_measurement() == CPU_ONLY


def test_a_failed_rate_is_shown(cli, measuring):
    part = failing(WITH_GPU, Quantity.BOTH_WAYS)
    measuring(part)
    done = cli("probe", "--device", "cpu")
    assert done.code == 0
    assert "link, both at once failed - out of memory" in rows(done.out)
    assert measured.read_measurement() == part


def test_a_machine_where_nothing_can_be_measured(cli, measuring):
    failed = [Rate(quantity=rate.quantity, failure="no") for rate in CPU_ONLY.rates]
    measuring(replace(CPU_ONLY, rates=tuple(failed)))
    done = cli("probe", "--device", "cpu")
    assert done.code == 1
    assert "matrix products failed - no" in rows(done.out)
    assert measured.read_measurement() is None


def test_a_busy_machine_is_told(cli, measuring):
    first, *rest = CPU_ONLY.rates
    busy = replace(first, typical_per_s=0.6 * first.best_per_s)
    measuring(replace(CPU_ONLY, rates=(busy, *rest)))
    assert "busy: medians up to 40% below" in cli("probe", "--device", "cpu").out


def test_what_plans_cannot_use_does_not_replace_what_they_can(cli, measuring):
    keep.save_measurement(CPU_ONLY)
    measuring(failing(CPU_ONLY, Quantity.MATMUL))
    done = cli("probe", "--device", "cpu")
    assert done.code == 1
    assert "not kept" in done.out
    assert "(matrix products)" in done.out
    assert measured.read_measurement() == CPU_ONLY


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--device", "simulated"), ("simulated", "cuda")),
        (("--device", "cuda"), ("CUDA is not available", "use 'cpu'")),
        (("--dtype", "int8"), ("int8",)),
        (("--json", "/no/such/folder/out.json"), ("no folder", "/no/such/folder/out.json")),
        (("--json", "/"), ("is a folder",)),
    ],
    ids=["device", "no CUDA", "dtype", "no folder", "folder"],
)
def test_bad_options_are_one_line_before_anything_is_measured(
    cli, measuring, monkeypatch, args, words
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = measuring(CPU_ONLY)
    done = cli("probe", *args)
    assert (done.code, done.out) == (2, "")
    (line,) = done.error_lines
    assert all(word in line for word in words)
    assert asked == []


def test_a_cache_folder_that_cannot_be_written_to_is_told_first(
    cli, measuring, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    asked = measuring(CPU_ONLY)
    done = cli("probe", "--device", "cpu")
    assert done.code == 2
    assert "XDG_CACHE_HOME" in done.err
    assert asked == []


def test_ctrl_c_ends_it_and_keeps_the_last_measurement(cli, monkeypatch):
    keep.save_measurement(CPU_ONLY)

    def interrupt(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("headinfer.probe.operations.copies", interrupt)
    done = cli("probe", "--device", "cpu", "--quick")
    err = done.err.lstrip("\n")  # rich before 15 ends the line of its bar
    assert (done.code, done.out, err) == (130, "", "headinfer: interrupted\n")
    assert measured.read_measurement() == CPU_ONLY
