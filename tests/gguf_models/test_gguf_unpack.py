"""What is unpacked from a GGUF file is the model that the file was made of."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer
from gguf_files import CHAT, gguf, write_gemma, write_llama
from headinfer.errors import ModelLoadError
from headinfer.gguf_models import folder, model_folder, read_stored, requirements
from saved_models import save_tokenizer


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


WRITE = {"llama": write_llama, "gemma": write_gemma}


@pytest.mark.parametrize("name", WRITE)
def test_the_logits_are_the_models(name, tmp_path):
    file = tmp_path / "tiny.gguf"
    model = WRITE[name](file)
    unpacked = AutoModelForCausalLM.from_pretrained(model_folder(str(file)))
    ids = torch.randint(4, 30, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(ids).logits, unpacked(ids).logits
    assert unpacked.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_gemmas_config_is_the_models(tmp_path):
    file = tmp_path / "tiny.gguf"
    expected = write_gemma(file).config
    found = json.loads((model_folder(str(file)) / "config.json").read_text())
    for key in ("layer_types", "sliding_window", "rope_parameters", "tie_word_embeddings"):
        assert found[key] == getattr(expected, key), key
    assert found["layer_types"].count("full_attention") == 1
    assert (found["head_dim"], found["eos_token_id"]) == (16, 2)
    assert found["query_pre_attn_scalar"] == 16


@pytest.mark.covering
@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize("add_bos", [True, False])
def test_texts_begin_as_the_file_says(name, add_bos, tmp_path):
    file = tmp_path / "tiny.gguf"
    WRITE[name](file, add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(str(file)))
    ids = tokenizer("hello")["input_ids"]
    assert (ids[0] == 1) is add_bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(ids) < 5


def test_the_tokenizer_knows_special_tokens_and_the_chat_template(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(str(file)))
    assert tokenizer("<s>hell</s>")["input_ids"] == [1, tokenizer.vocab_size - 1, 2]
    assert tokenizer.chat_template == CHAT


def test_a_shape_is_told_without_unpacking(tmp_path):
    from headinfer.cli.shapes import shape_of

    file = tmp_path / "tiny.gguf"
    model = write_gemma(file)
    shape = shape_of(str(file))
    weights_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    assert shape.weights_bytes == pytest.approx(weights_bytes, rel=0.01)
    assert [layer.window_tokens for layer in shape.layers] == [8] * 5 + [0, 8]
    assert shape.max_positions == 384
    assert not list((tmp_path / "cache").glob("headinfer/tiny-*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_unpacked_to_the_dtype_asked_for(dtype, tmp_path):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    exact = AutoModelForCausalLM.from_pretrained(model_folder(str(file)))
    rounded = AutoModelForCausalLM.from_pretrained(model_folder(str(file), dtype))
    assert rounded.dtype == getattr(torch, dtype)
    expected = exact.to(rounded.dtype).state_dict()
    assert expected.keys() == rounded.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in rounded.state_dict().items())


def test_a_file_is_kept_to_no_more_than_the_dtype_it_is_loaded_in(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    list(headinfer.generate(str(file), "hello", dtype="bfloat16", max_new_tokens=2))
    (kept,) = (tmp_path / "cache" / "headinfer").glob("tiny-*")
    assert kept == model_folder(str(file), "bfloat16")


def test_what_a_file_stored_is_known(tmp_path):
    file = tmp_path / "tiny.gguf"
    model = write_llama(file)
    stored = read_stored(model_folder(str(file)))
    assert stored.types == ("F32",)
    assert stored.num_bytes == sum(weight.nbytes for weight in model.parameters())


def test_generate_takes_a_file_by_its_path(tmp_path):
    file = tmp_path / "tiny.gguf"
    model = write_llama(file)
    prompt = "hello hello"
    parts = headinfer.generate(str(file), prompt, device="cpu", max_new_tokens=6, do_sample=False)
    text = "".join(part.text for part in parts)
    tokenizer = AutoTokenizer.from_pretrained(model_folder(str(file)))
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_file_is_unpacked_once_and_anew_when_it_has_changed(tmp_path, caplog):
    file = tmp_path / "my model.gguf"
    write_llama(file)
    first = model_folder(str(file))
    folder._file_folder.cache_clear()  # as another process begins
    assert model_folder(str(file)) == first
    assert first.name.startswith("my_model-")
    assert [record.getMessage().count("is unpacked once") for record in caplog.records] == [1]
    write_llama(file, add_bos=True)
    assert model_folder(str(file)) != first


def refused(file: Path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as raised:
        model_folder(str(file))
    line = str(raised.value)
    assert "\n" not in line
    for word in (file.name, *words):
        assert word in line


def test_an_architecture_that_transformers_does_not_read(tmp_path):
    file = tmp_path / "plamo.gguf"
    writer = gguf.GGUFWriter(file, "plamo")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(file, "cannot read", "'plamo'", "safetensors")


def test_files_that_are_cut_short_or_no_gguf(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refused(file, "damaged or cut short")
    file.write_bytes(content[:100])
    refused(file, "damaged or cut short")
    file.write_bytes(b"PK" + content)
    refused(file, "no GGUF file")


def test_a_file_that_cannot_be_read_is_not_unpacked_twice(tmp_path, monkeypatch, caplog):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    tried = []
    real_open = Path.open

    def opened(path, *args, **kwargs):
        if path.name == file.name:
            tried.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    refused(file, "cannot be read", "Permission denied")
    assert len(tried) == 1
    assert not caplog.records


@pytest.mark.parametrize("name", WRITE)
def test_what_lies_beside_a_file_has_no_say(name, tmp_path):
    alone, beside = tmp_path / "alone" / "tiny.gguf", tmp_path / "beside" / "tiny.gguf"
    for file in (alone, beside):
        file.parent.mkdir()
        WRITE[name](file)
    save_tokenizer(beside.parent, chat=True)
    (beside.parent / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    expected, found = (model_folder(str(file)) for file in (alone, beside))
    for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (found / part).read_text() == (expected / part).read_text(), part


def test_a_file_is_unpacked_anew_by_another_transformers(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    first = model_folder(str(file))
    folder._file_folder.cache_clear()
    monkeypatch.setattr(requirements, "version", lambda _name: "9.9.9")
    assert model_folder(str(file)) != first


def test_one_file_of_several(tmp_path):
    file = tmp_path / "tiny-00001-of-00003.gguf"
    write_llama(file, split__count=3)
    refused(file, "one of 3 files")


def test_what_reads_gguf_is_named_where_it_is_missing(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    refused(file, "needs gguf: pip install gguf")


def test_a_transformers_that_reads_tokenizers_wrongly(tmp_path, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    monkeypatch.setattr(requirements, "version", lambda name: "5.17.3")
    refused(file, "5.17.3", "pip install 'transformers>=5.18,<6'")
