"""The built model: deterministic, small, stock; the cache folder is safe under races."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headinfer.demo import ensure_model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **extra}


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
    from headinfer.demo import build

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def build_while_another_finishes(folder: Path) -> None:
        folder.mkdir()
        (folder / "mine").touch()
        winner = tmp_path / "headinfer" / f"demo-{build._digest()}"
        winner.mkdir()
        (winner / "theirs").touch()

    monkeypatch.setattr(build, "build_model", build_while_another_finishes)
    folder = ensure_model()
    assert [path.name for path in folder.iterdir()] == ["theirs"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failed_build_leaves_nothing(monkeypatch, tmp_path):
    from headinfer.demo import build

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(build, "build_model", fail)
    with pytest.raises(OSError, match="disk full"):
        ensure_model()
    assert list((tmp_path / "headinfer").iterdir()) == []


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
