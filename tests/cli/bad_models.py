"""Files and models with faults, which the table of bad inputs names."""

import json
from collections.abc import Callable
from pathlib import Path

FILES: dict[str, bytes] = {
    "latin": b"caf\xe9",
    "empty": b"",
    "blank": b" \n\t",
    "text": b"w1 w2 w3 w4",
    "null.json": b"null",
    "list.json": b"[]",
    "cut.json": b"{",
    "object.json": b"{}",
    "utf16.json": b"\xff\xfe\x00",
    "model.txt": b"no model",
    "cut.gguf": b"GGUF",
    "other.gguf": b"PK",
}


def config(**values: object) -> Callable[[Path], None]:
    """Change values of a model's config; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        kept = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: kept[key] for key in kept if kept[key] is not None}))

    return change


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Put another file in the place of a model's."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def asking(**values: object) -> Callable[[Path], None]:
    """Give a model a generation config."""
    return written("generation_config.json", json.dumps({"eos_token_id": 2} | values))


def template(text: str) -> Callable[[Path], None]:
    return written("chat_template.jinja", text)


def folder_for(name: str) -> Callable[[Path], None]:
    """Put a folder where a file should be."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


MODELS: dict[str, Callable[[Path], None]] = {
    "good": lambda folder: None,
    "no-config": without("config.json"),
    "null-config": written("config.json", "null"),
    "list-config": written("config.json", "[]"),
    "number-config": written("config.json", "5"),
    "empty-config": written("config.json", ""),
    "cut-config": written("config.json", "{"),
    "utf16-config": written("config.json", b"\xff\xfe\x00"),
    "config-of-nothing": written("config.json", "{}"),
    "folder-config": folder_for("config.json"),
    "kv-0": config(num_key_value_heads=0),
    "kv-3": config(num_key_value_heads=3),
    "kv-words": config(num_key_value_heads="two"),
    "heads-0": config(num_attention_heads=0),
    "hidden-0": config(hidden_size=0),
    "hidden-words": config(hidden_size="x"),
    "layers-0": config(num_hidden_layers=0),
    "layers-below-0": config(num_hidden_layers=-2),
    "vocabulary-0": config(vocab_size=0),
    "head-dim-0": config(head_dim=0),
    "head-dim-half": config(head_dim=7.5),
    "positions-words": config(max_position_embeddings="many"),
    "float7": config(dtype="float7"),
    "int8": config(dtype="int8"),
    "dtype-5": config(dtype=5),
    "activation": config(hidden_act="nope"),
    "rope-5": config(rope_parameters=5),
    "rope-type": config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4}),
    "layer-types": config(layer_types=["full_attention"]),
    "end-words": config(eos_token_id="x"),
    "class-name": config(architectures="LlamaForCausalLM"),
    "class-5": config(architectures=5),
    "type-5": config(model_type=5),
    "type-unknown": config(model_type="no-such-type"),
    "encoder-decoder": config(is_encoder_decoder=True),
    "classifier": config(architectures=["LlamaForSequenceClassification"]),
    "awq": config(quantization_config={"quant_method": "awq"}),
    "quantized-5": config(quantization_config=5),
    "no-tokenizer": lambda folder: [
        (folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
    ],
    "null-tokenizer": written("tokenizer.json", "null"),
    "cut-tokenizer": written("tokenizer.json", "{"),
    "empty-tokenizer": written("tokenizer.json", "{}"),
    "latin-tokenizer": written("tokenizer_config.json", b'{"a": "\xe9"}'),
    "null-tokenizer-config": written("tokenizer_config.json", "null"),
    "no-weights": without("model.safetensors"),
    "weights-of-words": written("model.safetensors", "nonsense"),
    "weights-pointer": written("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
    "null-generation": written("generation_config.json", "null"),
    "cut-generation": written("generation_config.json", "{"),
    "beams-words": asking(num_beams="two"),
    "beams-0": asking(num_beams=0),
    "stop-5": asking(stop_strings=5),
    "stop-nothing": asking(stop_strings=[""]),
    "time-words": asking(max_time="soon"),
    "end-id-words": asking(eos_token_id=["x"]),
    "pad-words": asking(pad_token_id="x"),
    "length-words": asking(max_length="x"),
    "new-below-0": asking(max_new_tokens=-5),
    "suppress-5": asking(suppress_tokens=5),
    "top-k-words": asking(do_sample=True, top_k="many"),
    "cache-unknown": asking(cache_implementation="nope"),
    "watermark-5": asking(watermarking_config=5),
    "template-raises": template("{{ raise_exception('system first') }}"),
    "template-syntax": template("{% if"),
    "template-undefined": template("{{ a.b.c }}"),
    "template-type": template('{{ 1 + "x" }}'),
    "template-zero": template("{{ 1 // 0 }}"),
    "template-call": template("{{ messages() }}"),
    "null-session": written("index.json", "null"),
    "cut-session": written("index.json", "{"),
    "later-session": written("index.json", '{"kind": "headinfer session", "format": 99}'),
    "changed-session": written(
        "index.json", '{"crc32": 1, "kind": "headinfer session", "format": 1, "tokens": 5}'
    ),
}
