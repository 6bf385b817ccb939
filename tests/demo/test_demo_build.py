"""The built model: deterministic, small, stock; the cache folder is safe under races."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from headinfer import folders, kept
from headinfer.checked_files import DIGESTS, seal_folder
from headinfer.demo import build, ensure_model
from headinfer.errors import ModelLoadError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **extra}


@pytest.mark.slow
def test_same_bytes_from_another_process(demo_folder, tmp_path):
    again = tmp_path / "again"
    subprocess.run(
        [sys.executable, "-m", "headinfer.demo", "build", str(again)],
        check=True,
        env=environment(PYTHONHASHSEED="7"),
    )
    assert contents(again) == contents(demo_folder)


def test_at_most_five_megabytes(demo_folder):
    assert sum(path.stat().st_size for path in demo_folder.iterdir()) <= 5_000_000


def test_stock_llama_in_safetensors(demo_folder, model):
    from transformers import LlamaForCausalLM

    assert type(model) is LlamaForCausalLM
    suffixes = {path.suffix for path in demo_folder.iterdir()}
    assert suffixes == {".json", ".safetensors", ".jinja"}
    assert "auto_map" not in json.loads((demo_folder / "config.json").read_text())
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 131072 + 4096


def test_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = ensure_model()
    assert folder.parent == tmp_path / "headinfer"
    before = contents(folder)
    assert ensure_model() == folder
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_loser_of_a_race_takes_the_winners_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build_while_another_finishes(folder: Path) -> None:
        folder.mkdir()
        (folder / "mine").touch()
        winner = tmp_path / "headinfer" / f"demo-{build._digest()}"
        winner.mkdir()
        (winner / "theirs").touch()
        seal_folder(winner)

    monkeypatch.setattr(build, "build_model", build_while_another_finishes)
    folder = ensure_model()
    assert sorted(path.name for path in folder.iterdir()) == [DIGESTS, "theirs"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def copied(monkeypatch, tmp_path, demo_folder) -> Path:
    """An empty cache folder; models are copied into it, for building one takes a second."""
    monkeypatch.setattr(build, "build_model", lambda folder: shutil.copytree(demo_folder, folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders._temporary_folder.cache_clear()
    kept._say_not_kept.cache_clear()
    return tmp_path / "cache"


def test_failed_build_leaves_nothing(copied, monkeypatch):
    from safetensors import SafetensorError

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise SafetensorError("disk full")

    monkeypatch.setattr(build, "build_model", fail)
    with pytest.raises(ModelLoadError, match=r"disk full.*XDG_CACHE_HOME"):
        ensure_model()
    assert list((copied / "headinfer").iterdir()) == []


def test_the_built_model_is_closed_to_others(copied):
    before = os.umask(0)
    try:
        folder = ensure_model()
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in (folder, folder.parent, copied)} == {0o700}
    assert {path.stat().st_mode & 0o7777 for path in folder.iterdir()} == {0o600}


def put_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def put_dangling_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("missing"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 100_000),
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: os.truncate(folder / "config.json", 0),
        lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        lambda folder: (folder / "config.json").chmod(0o666),
        lambda folder: (folder / DIGESTS).unlink(),
        lambda folder: [path.unlink() for path in folder.iterdir()],
        put_file,
        put_dangling_link,
    ],
)
def test_a_damaged_model_is_built_anew_and_said(copied, demo_folder, caplog, damage):
    folder = ensure_model()
    whole = contents(folder)
    damage(folder)
    assert ensure_model() == folder
    assert contents(folder) == whole
    assert ensure_model() == folder
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "is built anew" in record.getMessage()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def without_home(monkeypatch, cache: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def writable_by_all(monkeypatch, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


@pytest.mark.parametrize("unsafe", [without_home, writable_by_all])
def test_what_cannot_be_kept_is_built_for_the_process(copied, monkeypatch, caplog, unsafe):
    unsafe(monkeypatch, copied)
    folder = ensure_model()
    assert ensure_model() == folder
    assert (folder / "model.safetensors").is_file()
    assert folder.parent.parent.name.startswith("headinfer-scratch-")
    (record,) = caplog.records
    assert "built anew by each process" in record.getMessage()
    assert not copied.exists() or list(copied.iterdir()) == []


def test_what_a_killed_build_left_is_removed(copied):
    folder = ensure_model()
    left = folder.parent / "headinfer-scratch-abcdefgh"
    left.mkdir()
    folders._clear.cache_clear()  # as another process begins
    ensure_model()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_importing_the_demo_imports_nothing_heavy():
    # The package around it may: so it is replaced by an empty one.
    code = """
import importlib.util, sys, types
package = types.ModuleType("headinfer")
package.__path__ = importlib.util.find_spec("headinfer").submodule_search_locations
sys.modules["headinfer"] = package
import headinfer.demo
headinfer.demo.make_document(512)
assert not {"torch", "transformers", "tokenizers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
