"""The forms that models and prompts come in, at the command line."""

import json

import pytest

from saved_models import save_llama

GREEDY = ("--no-do-sample", "-n", 12)
THINKING = (
    "{% if enable_thinking is defined and not enable_thinking %}w5 w5 {% endif %}"
    "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}<assistant>"
)


def refusal(done) -> str:
    (line,) = done.error_lines
    assert done.code == 2
    assert done.out == ""
    assert line.startswith("headinfer: error: ")
    return line


def generate(cli, model, *args, prompt="w1 w2"):
    return cli("generate", "--model", model, "-p", prompt, *GREEDY, *args)


def result(done) -> dict:
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    return save_llama(folder, hidden_size=128, intermediate_size=256, eos_token_id=None)


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """Save a model with a chat template."""
    from transformers import AutoTokenizer

    def save(template):
        folder = save_llama(tmp_path_factory.mktemp("templated"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return save


def test_text_ends_before_a_stop(cli, llama, prompt, reference):
    whole = reference(prompt, do_sample=False, max_new_tokens=12)
    words = whole.split()
    stop = f"{words[3][-1]} {words[4]}"
    done = generate(cli, llama, "--stop", "never", "--stop", stop, prompt=prompt)
    assert done.code == 0
    assert done.out == whole[: whole.index(stop)] + "\n"
    found = result(generate(cli, llama, "--stop", stop, "--json", prompt=prompt))
    assert found["finish_reason"] == "stop"
    assert found["text"] + "\n" == done.out
    assert found["new_tokens"] <= 5
    assert "must be some text" in refusal(generate(cli, llama, "--stop", ""))


def test_the_system_comes_before_the_prompt(cli, chat_llama, templated, llama):
    def tokens(*args):
        return result(generate(cli, chat_llama, "--json", *args))["prompt_tokens"]

    assert tokens("--system", "w3 w4 w5") == tokens() + 4
    model = templated("{{ messages[-1].content }}")
    line = refusal(generate(cli, model, "--system", "w3"))
    assert "leaves out the system message; leave out --system, or put it into --prompt" in line
    assert "--raw leaves out" in refusal(generate(cli, chat_llama, "--raw", "--system", "w3"))
    assert "does not have" in refusal(generate(cli, llama, "--system", "w3"))
    broken = templated("{{ raise_exception('never') }}")
    assert "(never); --raw leaves it out" in refusal(generate(cli, broken, "--system", "w3"))


def test_values_for_the_chat_template(cli, templated, llama):
    model = templated(THINKING)

    def tokens(*args):
        return result(generate(cli, model, "--json", *args))["prompt_tokens"]

    assert tokens("--chat-template-kwargs", '{"enable_thinking": false}') == tokens() + 2
    assert tokens("--chat-template-kwargs", '{"enable_thinking": true}') == tokens()
    values = ("--chat-template-kwargs", '{"enable_thought": true}')
    assert "no value 'enable_thought'" in refusal(generate(cli, model, *values))
    assert "does not have" in refusal(generate(cli, llama, *values))
    for wrong in ("{", "enable_thinking=false", "[1]", "3", ""):
        assert "JSON" in refusal(generate(cli, model, "--chat-template-kwargs", wrong))


def test_an_adapter(cli, wide_llama, llama, prompt, tmp_path):
    from lora_files import save_lora, stock_with_lora
    from saved_models import make_tokenizer

    lora = save_lora(wide_llama, tmp_path / "lora")
    done = generate(cli, wide_llama, "--adapter", lora, prompt=prompt)
    assert done.code == 0, done.err
    assert f"adapter {lora}: LoRA of rank 4 on 8 matrices, not merged" in " ".join(done.err.split())
    tokenizer = make_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt")
    stock = stock_with_lora(wide_llama, lora)
    ids = stock.generate(**inputs, do_sample=False, max_new_tokens=12)[0, 70:]
    assert done.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert "does not fit model" in refusal(generate(cli, llama, "--adapter", lora))
    assert "cannot be loaded" in refusal(generate(cli, llama, "--adapter", tmp_path / "none"))


def test_without_peft(cli, llama, monkeypatch):
    monkeypatch.setattr("headinfer.generation.adapter.find_spec", lambda _name: None)
    line = refusal(generate(cli, llama, "--adapter", "x"))
    assert line.endswith("adapter 'x' needs peft: pip install peft")


@pytest.mark.parametrize("form", ["4bit", "8bit"])
def test_weights_are_quantised_at_loading(cli, wide_llama, form):
    pytest.importorskip("bitsandbytes", reason="weights are quantised with bitsandbytes")
    plain = result(generate(cli, wide_llama, "--json"))
    found = result(generate(cli, wide_llama, "--json", "--load-in", form))
    assert (plain["load_in"], found["load_in"]) == (None, form)
    assert found["plan"]["weights_bytes"] < 0.5 * plain["plan"]["weights_bytes"]
    done = generate(cli, wide_llama, "--load-in", form)
    assert f"quantised: {form} by bitsandbytes, the rest in float32: " in done.err
    assert generate(cli, wide_llama, "--load-in", form, "--quiet").err == ""


def test_without_bitsandbytes(cli, llama, monkeypatch):
    monkeypatch.setattr("headinfer.generation.quantised.find_spec", lambda _name: None)
    line = refusal(generate(cli, llama, "--load-in", "4bit"))
    assert line.endswith("weights in 4bit need bitsandbytes: pip install bitsandbytes")
    assert "--load-in" in refusal(generate(cli, llama, "--load-in", "3bit"))


@pytest.mark.slow
def test_plans_for_quantised_weights(cli, tmp_path):
    def weights_bytes(*args):
        path = tmp_path / "plan.json"
        done = cli("plan", "--model", "llama-3-8b", "--json", path, *args)
        assert done.code == 0, done.err
        (row, *_) = json.loads(path.read_text())["methods"]
        return row["weights_bytes"]

    plain = weights_bytes()
    assert weights_bytes("--load-in", "4bit") < 0.4 * plain < weights_bytes("--load-in", "8bit")


def test_a_gguf_file_says_what_is_loaded(cli, tmp_path, monkeypatch):
    from gguf_files import write_llama

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    weights_bytes = sum(weight.nbytes for weight in write_llama(file).parameters())
    for dtype, share in (("auto", 1), ("bfloat16", 0.5)):
        done = generate(cli, file, "--dtype", dtype, "--json", "--raw", prompt="hello")
        planned = result(done)["plan"]["weights_bytes"]
        assert planned == pytest.approx(share * weights_bytes, rel=0.01)
        shown = "float32" if dtype == "auto" else dtype
        assert "GGUF: " in done.err
        assert f" of F32, unpacked to {shown}: " in done.err
