"""`headinfer demo` with another model than the embedded one."""

import json

import pytest

from headinfer.demo.manual import HIDDEN, make_manual
from saved_models import save_llama


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny random model with a chat template and 2048 positions."""
    return save_llama(tmp_path_factory.mktemp("talker"), chat=True, positions=2048)


def demo(cli, model, *args):
    return cli("demo", "--model", model, "--tokens", "1K", *args)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_answers_are_stocks(cli, talker, device):
    done = demo(cli, talker, "--device", device)
    assert done.code == 0, done.err
    assert done.out.count("; as stock") == len(HIDDEN)
    assert f"{len(HIDDEN)} of {len(HIDDEN)} as stock answers" in done.out
    for hidden in HIDDEN:
        assert hidden.question in done.out
    assert "KV in GPU memory" in done.out or device == "cpu"


def test_an_answer_that_is_not_stocks_is_shown_beside_it(cli, talker, monkeypatch):
    from headinfer.cli import demo_real

    ask = demo_real._Asker.ask_stock
    monkeypatch.setattr(
        demo_real._Asker, "ask_stock", lambda self: [([1], "another"), *ask(self)[1:]]
    )
    done = demo(cli, talker, "--device", "cpu")
    assert done.code == 1
    assert "STOCK: another" in done.out
    assert f"{len(HIDDEN) - 1} of {len(HIDDEN)} as stock answers" in done.out


def test_right_answers_are_told_from_wrong_ones(cli, talker, monkeypatch):
    from headinfer.cli import demo_real

    monkeypatch.setattr(
        demo_real._Asker, "answer", lambda self, number, cache, write: ([1], HIDDEN[0].answer)
    )
    done = demo(cli, talker, "--device", "cpu")
    assert done.out.count("  right; as stock") == 1
    assert f"wrong, it is: {HIDDEN[1].answer}" in done.out
    assert f"1 of {len(HIDDEN)} right" in done.out


def test_bad_input_is_one_line(cli, llama, talker):
    for args, words in (
        ((llama,), "has no chat template"),
        ((talker, "--tokens", "4K"), "was made for 2048 positions"),
        ((talker, "--tokens", "50"), "at least 512 tokens"),
        (("no/such/model",), "neither a folder nor a model id"),
    ):
        done = cli("demo", "--model", *args)
        assert done.code == 2
        assert len(done.error_lines) == 1
        assert words in done.error_lines[0]


def test_a_model_with_sliding_windows_is_refused_before_any_work(cli, tmp_path, monkeypatch):
    from headinfer.cli import demo_real

    monkeypatch.setattr(demo_real, "load_model", lambda *_args, **_more: pytest.fail("loaded"))
    windowed = save_llama(tmp_path / "windowed", chat=True, positions=2048)
    config = json.loads((windowed / "config.json").read_text())
    windows = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * config["num_hidden_layers"],
    }
    (windowed / "config.json").write_text(json.dumps(config | windows))
    done = demo(cli, windowed)
    assert done.code == 2
    (line,) = done.error_lines
    assert "the demo needs full attention; take smollm2" in line


def test_a_seed_is_for_the_embedded_model_alone(cli, talker):
    done = demo(cli, talker, "--seed", "3")
    assert done.code == 2
    (line,) = done.error_lines
    assert "--seed 3: it chooses a document for the model demo alone; leave it out" in line


def test_the_document_holds_the_manual_and_all_hidden_sentences():
    def count(text):
        return len(text.split())

    manual = make_manual(3000, count)
    assert 2500 < manual.num_tokens <= 3000
    assert [manual.text.count(hidden.sentence) for hidden in HIDDEN] == [1] * len(HIDDEN)
    assert list(manual.depths) == sorted(manual.depths)
    assert 0.15 < manual.depths[0] < 0.4 < 0.7 < manual.depths[-1] < 1
    parts = manual.text.split("\n\n")
    assert all(parts[parts.index(hidden.sentence) - 1].endswith(".") for hidden in HIDDEN)
    assert "A *block* is a piece of Python program text" in " ".join(manual.text.split())
    assert make_manual(3000, count) == manual
