"""What was measured: the planner's view of it, and the file it is kept in."""

import json
import logging
import os
import pwd
from dataclasses import replace

import pytest

from headinfer.errors import OptionError
from headinfer.plan import measured
from headinfer.plan.measurement import NO_GPU, Identity, Quantity
from headinfer.probe import keep
from measurements import CPU_ONLY, WITH_GPU, failing


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_ceilings_are_the_best_and_predictions_the_median():
    hardware = WITH_GPU.hardware
    assert hardware.name == "this"
    assert hardware.measured
    assert hardware.description == "a GPU, measured 2026-03-01"
    assert hardware.device_memory_bytes == 24 * 2**30
    assert hardware.host_memory_bytes == 16 * 2**30
    assert hardware.matmul_flops_per_s == 500e9
    assert hardware.device_bytes_per_s == 1000e9
    assert hardware.host_bytes_per_s == 25e9
    assert hardware.prefill_attention_flops_per_s == 200e9
    assert hardware.chunk_attention_flops_per_s == ((1024, 120e9), (8192, 200e9))
    # The largest size counts, in whatever order they were measured.
    assert hardware.decode_attention_bytes_per_s == 600e9
    assert hardware.host_attention_bytes_per_s == 10e9
    assert hardware.host_verify_bytes_per_s == 5e9
    assert hardware.host_shared_bytes_per_s == 22.5e9
    assert hardware.link_bytes_per_s == 20e9
    assert hardware.link_back_bytes_per_s == 18e9
    # A small copy's time less what its bytes take in a large one.
    assert hardware.copy_start_s == pytest.approx(2**18 / 8e9 - 2**18 / 20e9)


def test_without_a_device_the_cpu_is_the_device():
    hardware = CPU_ONLY.hardware
    assert hardware.description == "a processor, measured 2026-03-01"
    assert hardware.device_memory_bytes == hardware.host_memory_bytes
    assert hardware.device_bytes_per_s == hardware.host_bytes_per_s == 25e9
    assert hardware.decode_attention_bytes_per_s == hardware.host_attention_bytes_per_s == 10e9
    assert hardware.link_bytes_per_s is hardware.link_back_bytes_per_s is None


@pytest.mark.parametrize("quantity", [Quantity.MATMUL, Quantity.TO_HOST])
def test_a_machine_that_was_measured_in_part_is_none(quantity):
    part = failing(WITH_GPU, quantity)
    assert part.hardware is None
    assert part.missing == (quantity,)
    assert failing(WITH_GPU, Quantity.BOTH_WAYS).hardware == WITH_GPU.hardware


def test_shares_are_of_what_bounds_the_rate():
    shares = {
        (rate.quantity, rate.size): WITH_GPU.share_of_ceiling(rate) for rate in WITH_GPU.rates
    }
    assert shares[Quantity.MATMUL, None] is None
    assert shares[Quantity.PREFILL_ATTENTION, 8192] == pytest.approx(200 / 500)
    assert shares[Quantity.DECODE_ATTENTION, 131072] == pytest.approx(600 / 1000)
    assert shares[Quantity.HOST_ATTENTION, 8192] == pytest.approx(12 / 25)
    assert shares[Quantity.TO_DEVICE, 2**18] == pytest.approx(8 / 25)
    assert shares[Quantity.BOTH_WAYS, 2**28] == pytest.approx(30 / (25 + 22.5))
    unread = failing(CPU_ONLY, Quantity.HOST_READ)
    assert {unread.share_of_ceiling(rate) for rate in unread.rates} == {None, 120 / 500, 200 / 500}


@pytest.mark.parametrize("measurement", [CPU_ONLY, WITH_GPU], ids=["cpu", "gpu"])
def test_what_is_saved_is_loaded(measurement, caplog):
    assert measured.load_measured() is None
    assert caplog.records == []  # never to have probed is no mistake
    path = keep.save_measurement(measurement)
    assert path == measured.measurement_path()
    assert measured.read_measurement() == measurement
    assert measured.load_measured() == measurement.hardware


def test_the_last_measurement_counts_and_nothing_else_is_left():
    keep.save_measurement(WITH_GPU)
    path = keep.save_measurement(CPU_ONLY)
    assert measured.read_measurement() == CPU_ONLY
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_a_failed_save_keeps_the_old_file(monkeypatch):
    path = keep.save_measurement(CPU_ONLY)

    def fail(*_paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured.Path, "replace", fail)
    with pytest.raises(OptionError, match="No space left on device"):
        keep.save_measurement(WITH_GPU)
    assert measured.read_measurement() == CPU_ONLY
    assert [file.name for file in path.parent.iterdir()] == ["machine.json"]


def test_a_folder_that_cannot_be_written_to_is_told_early(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OptionError, match="XDG_CACHE_HOME"):
        keep.check_writable()
    with pytest.raises(OptionError, match="XDG_CACHE_HOME"):
        keep.save_measurement(CPU_ONLY)


def damage(**changes) -> str:
    return json.dumps(keep.to_json(CPU_ONLY) | changes)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "Expecting value"),
        (damage()[:200], "Expecting"),
        ("[1, 2]", "not a JSON object"),
        (damage(format=0), "its format is 0, not 1"),
        ("{}", "its format is None"),
        (damage(rates=None), "rates are missing"),
        (damage(rates=[3]), "not a valid Quantity"),
        (damage(identity={"cpu": "x"}), "cpu_threads is missing"),
        (damage(identity=None), "cpu is missing"),
        (damage(host_memory_bytes="much"), "host_memory_bytes is 'much'"),
        (damage(host_memory_bytes=0), "host_memory_bytes is 0"),
        (damage(rates=[]), "lacks matmul"),
        (damage().replace("16000000000.0", "NaN"), "typical_per_s is nan"),
        (damage().replace("16000000000.0", "-1.0"), "typical_per_s is -1.0"),
        (damage().replace("16000000000.0", "1e-300"), "typical_per_s is 1e-300"),
        (damage().replace("16000000000.0", "1e300"), "typical_per_s is 1e+300"),
        (damage(host_memory_bytes=10**400), "host_memory_bytes is 1000"),
        (damage().replace("16000000000.0", "1" * 5000), "integer string"),
        ("[" * 500_000, "nested too deeply"),
        (damage() + " " * 2**20, "more than 1048576 bytes"),
        (damage().replace("host_read", "disk_read"), "disk_read"),
        ("\ud800", "utf-8"),
    ],
)
def test_a_damaged_file_is_a_warning(text, word, caplog):
    keep.save_measurement(CPU_ONLY)
    measured.measurement_path().write_bytes(text.encode("utf-8", "surrogatepass"))
    assert measured.load_measured() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert word in record.getMessage()
    assert "run `headinfer probe` again" in record.getMessage()


def test_a_file_in_the_way_is_a_warning(caplog):
    measured.measurement_path().mkdir(parents=True)
    assert measured.load_measured() is None
    assert "directory" in caplog.text


def test_what_another_user_can_have_written_is_a_warning(monkeypatch, caplog):
    path = keep.save_measurement(CPU_ONLY)
    assert path.stat().st_mode & 0o7777 == 0o600
    path.chmod(0o666)
    assert measured.load_measured() is None
    assert "other users can write to it" in caplog.text
    if os.geteuid() == 0:
        path.chmod(0o600)
        os.chown(path, 12345, 12345)
        assert measured.load_measured() is None
        assert "belongs to another user, of id 12345" in caplog.text
    keep.save_measurement(CPU_ONLY)
    assert measured.load_measured() == CPU_ONLY.hardware


def test_a_pipe_is_a_warning(caplog):
    measured.measurement_path().parent.mkdir(parents=True)
    os.mkfifo(measured.measurement_path())
    assert measured.load_measured() is None
    assert "not a regular file" in caplog.text


def test_without_a_home_nothing_is_kept(monkeypatch, caplog):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert measured.load_measured() is None
    assert caplog.records == []
    with pytest.raises(OptionError, match=r"no home folder.*XDG_CACHE_HOME"):
        keep.check_writable()
    with pytest.raises(OptionError, match=r"no home folder.*XDG_CACHE_HOME"):
        keep.save_measurement(CPU_ONLY)


def test_nothing_is_kept_where_all_can_write(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(OptionError, match="can be written to by other users"):
        keep.check_writable()
    with pytest.raises(OptionError, match="can be written to by other users"):
        keep.save_measurement(CPU_ONLY)
    assert list(tmp_path.iterdir()) == []


def test_another_machines_measurement_is_ignored():
    keep.save_measurement(WITH_GPU)
    here = WITH_GPU.identity
    assert measured.load_measured(here) == WITH_GPU.hardware
    assert measured.load_measured(replace(here, gpu=None)) == WITH_GPU.hardware  # not known
    for other in (
        replace(here, gpu="another GPU"),
        replace(here, gpu=NO_GPU),
        replace(here, cpu="another processor"),
        Identity(cpu="a processor", cpu_threads=64, gpu=None),
    ):
        assert measured.load_measured(other) is None
    assert measured.load_measured() == WITH_GPU.hardware
