"""A table of mistakes: what a user writes or has, and the words that the one line must have.

In arguments, `{name}` is a model of `MODELS` or a file of `FILES`.
"""

import json
from collections.abc import Callable
from pathlib import Path

Row = tuple[tuple[str, ...], tuple[str, ...]]
"""Arguments of the command, and words of the line."""

LONG = "x" * 5000
BIG = "9" * 23
HUGE = "9" * 400

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
}


def _with_model(*args: str) -> tuple[str, ...]:
    return ("generate", "-p", "w1", "-m", "{good}", *args)


def _option(option: str, value: str, *words: str) -> Row:
    """A wrong value of an option of `generate`: the line names the option."""
    return ("generate", "-p", "w1", option, value), (option, *words)


def _model(name: str, *words: str) -> Row:
    return ("generate", "-p", "w1", "-m", f"{{{name}}}"), words


_SIZES: list[Row] = [
    _option("--device-memory", "24 gigs", "'24 gigs'", "24GiB"),
    _option("--device-memory", "24", "did you mean '24GiB'?"),
    _option("--device-memory", "1.5", "did you mean '1.5GiB'?"),
    _option("--device-memory", "", "''", "24GiB"),
    _option("--device-memory", "0", "positive"),
    _option("--device-memory", "-1GiB", "'-1GiB'"),
    _option("--device-memory", "1e9", "'1e9'"),
    _option("--device-memory", "inf", "'inf'"),
    _option("--device-memory", HUGE, "more than 1024 PiB"),
    _option("--host-memory", "lots", "'lots'"),
    _option("--host-memory", "8.5", "'8.5GiB'"),
    _option("--host-memory", f"{BIG}TiB", "more than 1024 PiB"),
]
_COUNTS: list[Row] = [
    _option("--chunk-tokens", "0", "positive", "'0'"),
    _option("--chunk-tokens", "-5", "'-5'"),
    _option("--chunk-tokens", "1.5", "'1.5'"),
    _option("--chunk-tokens", "all", "'all'"),
    _option("--chunk-tokens", "4k5", "'4k5'"),
    _option("--chunk-tokens", "", "''"),
    _option("--chunk-tokens", "999999999999", "more than 68,719,476,736"),
    _option("--chunk-tokens", HUGE, "more than 68,719,476,736"),
    _option("--tile-heads", "0", "'0'", "'all' or 'auto'"),
    _option("--tile-heads", "2.5", "'2.5'"),
    _option("--tile-heads", "999999999999", "more than"),
    _option("--tile-tokens", "0", "'0'"),
    _option("--tile-tokens", "many", "'many'"),
    _option("--tile-tokens", "999999999999", "more than"),
    _option("--resident-tokens", "-1", "from 0 on", "'-1'"),
    _option("--resident-tokens", "999999999999", "more than"),
    _option("--sink-tokens", "-1", "'-1'"),
    _option("--sink-tokens", "999999999999", "more than"),
    _option("--recent-tokens", "0", "'0'"),
]
_SHARES: list[Row] = [
    _option("--host-attention", "2", "from 0 to 1"),
    _option("--host-attention", "half", "'half'", "'off' or 'auto'"),
    _option("--host-attention", "nan", "'nan'"),
    _option("--host-attention", "-0.1", "'-0.1'"),
    _option("--sparsity", "2", "from 0 to 1"),
    _option("--sparsity", "auto", "'auto'"),
    _option("--sparsity", "", "''"),
    _option("--head-pattern", "", "''", "'random'"),
    _option("--fuse", "on", "'auto' or 'off'"),
    _option("--device", "tpu", "'tpu'", "cuda"),
    _option("--device", "cuda:1", "'cuda:1'"),
]
_NUMBERS: list[Row] = [
    _option("--threads", "0", "'0'", "at least 1"),
    _option("--threads", "-1", "'-1'"),
    _option("--threads", "1.5", "'1.5'", "whole number"),
    _option("--threads", "100000", "at most", "for each core"),
    _option("--threads", HUGE, "at most"),
    _option("--seed", "x", "'x'", "whole number"),
    _option("--seed", "1.5", "'1.5'", "whole number"),
    _option("--seed", "", "''", "whole number"),
    _option("--seed", BIG, BIG, "2**64 - 1"),
    _option("--seed", "-9223372036854775809", "-2**63"),
    _option("--dtype", "float64", "'float64'", "'bfloat16'"),
    _option("--dtype", "", "''", "'bfloat16'"),
    _option("--max-new-tokens", "0", "at least 1"),
    _option("--max-new-tokens", "4K", "'4K'", "whole number"),
    _option("--max-new-tokens", BIG, "at most 2,147,483,647"),
    _option("--temperature", "0", "above 0", "--no-do-sample"),
    _option("--temperature", "-1", "above 0"),
    _option("--temperature", "hot", "'hot'", "number"),
    _option("--temperature", "inf", "finite"),
    _option("--temperature", "1e400", "finite"),
    _option("--top-k", "-1", "at least 0"),
    _option("--top-k", "some", "'some'", "whole number"),
    _option("--top-k", BIG, "at most"),
    _option("--top-p", "1.5", "at most 1"),
    _option("--top-p", "nan", "finite"),
    _option("--min-p", "2", "from 0 to 1"),
    _option("--repetition-penalty", "0", "above 0"),
    _option("--repetition-penalty", "inf", "finite"),
    _option("--no-repeat-ngram-size", "-1", "at least 0"),
    _option("--no-repeat-ngram-size", BIG, "at most"),
    _option("--num-beams", "0", "at least 1"),
    _option("--num-beams", BIG, "at most"),
    _option("--length-penalty", "1", "--num-beams"),
    _option("--prompt-lookup", "0", "at least 1"),
    _option("--prompt-lookup", BIG, "at most"),
]
_TOGETHER: list[Row] = [
    (("generate", "-p", "w1", "-p", "w2"), ("--prompt/-p", "2 times")),
    (("generate", "-p", "w1", "--seed", "1", "--seed", "1"), ("--seed", "2 times")),
    (
        ("generate", "-p", "w1", "--do-sample", "--no-do-sample"),
        ("--do-sample and --no-do-sample",),
    ),
    (("generate", "-f", "-", "-f", "-"), ("--prompt-file -", "stdin")),
    (("generate", "-p", "w1", "--no-do-sample", "--temperature", "0.5"), ("--temperature",)),
    (
        ("generate", "-p", "w1", "--prompt-lookup", "3", "--num-beams", "2"),
        ("--prompt-lookup", "--num-beams"),
    ),
    (
        ("generate", "-p", "w1", "--prompt-lookup", "3", "--prompt-lookup-num-tokens", "3"),
        ("one option",),
    ),
    (
        ("generate", "-p", "w1", "--num-beams", "2", "--length-penalty", "nan"),
        ("--length-penalty", "finite"),
    ),
    (("generate", "-p", "w1", "--no-such-option"), ("--no-such-option",)),
    (("generate", "-p", "w1", "--dtype"), ("--dtype", "requires an argument")),
    (("generate", "w1"), ("unexpected", "w1")),
    (("nope",), ("'nope'",)),
    (("--nope",), ("--nope",)),
]
_PROMPTS: list[Row] = [
    (("generate", "-p", ""), ("empty", "--prompt")),
    (("generate", "-p", "  \n"), ("empty", "--prompt")),
    (("generate", "-p", "w1 \udcff"), ("not UTF-8", "character 3")),
    (("generate", "-f", "/no/such/file"), ("/no/such/file", "No such file")),
    (("generate", "-f", "{latin}"), ("not UTF-8", "0xe9 at offset 3")),
    (("generate", "-f", "{empty}"), ("is empty",)),
    (("generate", "-f", "{blank}"), ("is empty",)),
    (("generate", "-f", "/"), ("cannot be read", "directory")),
    (("generate", "-f", ""), ("''", "No such file")),
    (("generate", "-f", LONG), ("File name too long", "xxx...xxx")),
    (
        ("generate", "-m", "{good}", "-p", " ".join(["w1"] * 600)),
        ("600 tokens", "512 positions", "--allow-long-prompt"),
    ),
]
_NAMES: list[Row] = [
    (("generate", "-p", "w1", "-m", name), words)
    for name, words in {
        "/no/such/folder": ("'/no/such/folder'", "neither a folder nor a model id"),
        "./nothing": ("'./nothing'", "neither a folder nor a model id"),
        "a/b/c": ("'a/b/c'", "neither a folder nor a model id"),
        "nobody/nothing": ("'nobody/nothing'", "not among the local files"),
        "": ("''", "neither a folder nor a model id"),
        "a\nb": (r"'a\nb'", "neither a folder nor a model id"),
        "\0": (r"'\x00'", "neither a folder nor a model id"),
        LONG: ("xxx...xxx", "neither a folder nor a model id"),
        "a/" * 2500: ("neither a folder nor a model id",),
        "{model.txt}": ("is a file", "config.json"),
        "{cut.gguf}": ("GGUF",),
        "{other.gguf}": ("GGUF",),
        "{no-config}": ("no config.json",),
    }.items()
]
_CONFIGS: list[Row] = [
    _model("null-config", "config.json", "null"),
    _model("list-config", "config.json", "a list"),
    _model("number-config", "config.json", "a number"),
    _model("empty-config", "config.json", "not JSON"),
    _model("cut-config", "config.json", "not JSON", "line 1 column 2"),
    _model("utf16-config", "config.json", "not UTF-8"),
    _model("config-of-nothing", "config.json", "model_type"),
    _model("folder-config", "config.json"),
    *(
        _model(name, f"{key} in its config.json must be ", f"not {value}")
        for name, key, value in (
            ("kv-0", "num_key_value_heads", "0"),
            ("kv-3", "num_key_value_heads", "3"),
            ("kv-words", "num_key_value_heads", "'two'"),
            ("heads-0", "num_attention_heads", "0"),
            ("hidden-0", "hidden_size", "0"),
            ("hidden-words", "hidden_size", "'x'"),
            ("layers-0", "num_hidden_layers", "0"),
            ("layers-below-0", "num_hidden_layers", "-2"),
            ("vocabulary-0", "vocab_size", "0"),
            ("head-dim-0", "head_dim", "0"),
            ("head-dim-half", "head_dim", "7.5"),
            ("positions-words", "max_position_embeddings", "'many'"),
            ("float7", "dtype", "'float7'"),
            ("int8", "dtype", "'int8'"),
            ("dtype-5", "dtype", "5"),
            ("class-name", "architectures", "'LlamaForCausalLM'"),
            ("class-5", "architectures", "5"),
            ("type-5", "model_type", "5"),
        )
    ),
    _model("activation", "transformers", "'nope'", "config.json"),
    _model("rope-5", "rope_parameters in its config.json"),
    _model("rope-type", "transformers", "'nope'", "config.json"),
    _model("layer-types", "`layer_types` (1)"),
    _model("end-words", "eos_token_id in its config.json"),
    _model("type-unknown", "no-such-type"),
    _model("encoder-decoder", "encoder-decoder"),
    _model("classifier", "LlamaForSequenceClassification"),
    _model("awq", "AWQ", "install"),
    _model("quantized-5", "config.json"),
]
_OTHER_FILES: list[Row] = [
    _model("no-tokenizer", "tokenizer"),
    _model("null-tokenizer", "tokenizer.json", "null"),
    _model("cut-tokenizer", "tokenizer.json", "not JSON"),
    _model("empty-tokenizer", "tokenizer", "fetch"),
    _model("latin-tokenizer", "tokenizer_config.json", "not UTF-8"),
    _model("null-tokenizer-config", "tokenizer_config.json", "null"),
    _model("no-weights", "cannot be loaded", "safetensors"),
    _model("weights-of-words", "model.safetensors is damaged"),
    _model("weights-pointer", "git lfs pull"),
    _model("null-generation", "generation_config.json", "null"),
    _model("cut-generation", "generation_config.json", "not JSON"),
    *(
        _model(name, f"{key} in its generation_config.json must be ", f"not {value}")
        for name, key, value in (
            ("beams-words", "num_beams", "'two'"),
            ("beams-0", "num_beams", "0"),
            ("stop-5", "stop_strings", "5"),
            ("stop-nothing", "stop_strings", "['']"),
            ("time-words", "max_time", "'soon'"),
            ("end-id-words", "eos_token_id", "['x']"),
            ("pad-words", "pad_token_id", "'x'"),
            ("length-words", "max_length", "'x'"),
            ("new-below-0", "max_new_tokens", "-5"),
            ("suppress-5", "suppress_tokens", "5"),
            ("top-k-words", "top_k", "'many'"),
        )
    ),
    _model("cache-unknown", "cache_implementation", "nope"),
    _model("watermark-5", "cannot be loaded"),
    _model("template-raises", "system first", "--raw"),
    _model("template-syntax", "chat template", "--raw"),
    _model("template-undefined", "'a' is undefined", "--raw"),
    _model("template-type", "chat template", "TypeError", "--raw"),
    _model("template-zero", "chat template", "ZeroDivisionError", "--raw"),
    _model("template-call", "chat template", "not callable", "--raw"),
]
_RUNS: list[Row] = [
    (_with_model("--device-memory", "4KiB", "-q"), ("below the weights", "give at least")),
    (_with_model("--tile-heads", "3", "-q"), ("--tile-heads is 3", "2 KV heads")),
    (_with_model("--head-pattern", "/no/such"), ("--head-pattern", "--sparsity is 0")),
    (_with_model("--sparsity", "0.5", "--head-pattern", "/no/such"), ("/no/such",)),
    (_with_model("--trace", ""), ("--trace ''", "names no file")),
    (_with_model("--trace", "/no/such/file"), ("--trace", "no folder")),
    (_with_model("--trace", "/"), ("--trace", "is a folder")),
    (_with_model("--trace", "-"), ("--trace", "only --json")),
    (_with_model("--trace", LONG), ("--trace", "xxx...xxx")),
]
_PLAN: list[Row] = [
    (("plan", *args), words)
    for args, words in (
        (("--context", "0"), ("--context", "positive")),
        (("--context", "-1"), ("--context", "'-1'")),
        (("--context", "many"), ("--context", "'many'", "128K")),
        (("--context", "1.5"), ("--context", "whole", "'1.5'")),
        (("--context", "999999999999"), ("--context", "more than 68,719,476,736")),
        (("--context", "1K", "--context", "2K"), ("--context", "2 times")),
        (("--contexts", "1K"), ("--contexts", "--context")),
        (("--batch", "0"), ("--batch", "at least 1")),
        (("--batch", "x"), ("--batch", "'x'", "whole number")),
        (("--batch", BIG), ("--batch", "at most 65,536")),
        (("--hardware", "h100"), ("'h100'", "h100-80gb")),
        (("--hardware", ""), ("''", "rtx-4090")),
        (("--hardware", "this"), ("'this'", "headinfer probe")),
        (("--accounting", "theirs"), ("--accounting", "'theirs'", "'paper'")),
        (("--device-memory", HUGE), ("--device-memory", "1024 PiB")),
        (("--sparsity", "2"), ("--sparsity", "from 0 to 1")),
        (("--chunk-tokens", "999999999999"), ("--chunk-tokens", "more than")),
        (("--dtype", "int8"), ("--dtype", "'int8'")),
        (("--json", "/no/such/file"), ("--json", "no folder")),
        (("--json", ""), ("--json ''", "names no file")),
        (("--paper", "--context", "1K"), ("--paper", "--context")),
        (("--model", "/no/such"), ("'/no/such'", "neither")),
        (("--model", "nothing"), ("'nothing'", "these need no network", "llama-3-8b")),
        (("--model", LONG), ("xxx...xxx", "neither")),
        (("--model", "{null.json}"), ("null.json", "no mapping")),
        (("--model", "{list.json}"), ("list.json", "no mapping")),
        (("--model", "{cut.json}"), ("cut.json", "not JSON")),
        (("--model", "{object.json}"), ("object.json", "model_type")),
        (("--model", "{utf16.json}"), ("utf16.json", "cannot be read")),
        (("--model", "{latin}"), ("latin", "no config")),
        (("--model", "{kv-0}"), ("num_key_value_heads", "positive", "not 0")),
        (("--model", "{kv-words}"), ("num_key_value_heads", "'two'")),
        (("--model", "{float7}"), ("'float7'",)),
        (("--model", "{layer-types}"), ("1 layer_types for 2",)),
        (("extra",), ("unexpected", "extra")),
    )
]
_OTHERS: list[Row] = [
    (("roofline", "--contexts", ""), ("--contexts", "1K")),
    (("roofline", "--contexts", "1K,,2K"), ("--contexts", "comma")),
    (("roofline", "--contexts", "1K,x"), ("--contexts", "'x'")),
    (("roofline", "--hardware", "x"), ("'x'", "rtx-4090")),
    (("roofline", "--plot", "x"), ("--plot", ".png")),
    (("roofline", "--plot", "x.gif"), ("--plot", "'.gif'")),
    (("roofline", "--plot", ""), ("--plot ''", "names no file")),
    (("roofline", "--plot", "/no/x.png"), ("--plot", "no folder")),
    (("roofline", "--paper", "--causal"), ("--paper", "--causal")),
    (("probe", "--device", "tpu"), ("--device", "'tpu'", "'cuda'")),
    (("probe", "--dtype", "int8"), ("--dtype", "'int8'")),
    (("probe", "--json", "/no/x"), ("--json", "no folder")),
    (("heads",), ("Missing option", "--")),
    (("heads", "-m", "{good}"), ("--output",)),
    (("heads", "-m", "{good}", "-o", ""), ("--output ''", "names no file")),
    (("heads", "-m", "{good}", "-o", "/no/x"), ("--output", "no folder")),
    (("heads", "-m", "{good}", "-o", "{new}", "--method", "x"), ("--method", "'x'", "'copy'")),
    (("heads", "-m", "{good}", "-o", "{new}", "--tokens", "many"), ("--tokens", "'many'")),
    (("heads", "-m", "{good}", "-o", "{new}", "--tokens", "100K"), ("--tokens", "512")),
    (("heads", "-m", "{good}", "-o", "{new}", "--samples", "0"), ("--samples", "at least 1")),
    (("heads", "-m", "{good}", "-o", "{new}", "--steps", "5"), ("--steps", "--optimise")),
    (("heads", "-m", "{good}", "-o", "{new}", "--seed", BIG), ("--seed", "2**64 - 1")),
    (("heads", "-m", "{good}", "-o", "{new}", "--sink-tokens", "-1"), ("--sink-tokens", "'-1'")),
    (("heads", "-m", "llama-3-8b", "-o", "{new}"), ("llama-3-8b", "without weights")),
    (("demo", "--tokens", "0"), ("--tokens", "positive")),
    (("demo", "--tokens", "5"), ("--tokens", "at least 512")),
    (("demo", "--tokens", "100M"), ("--tokens 100M", "at most 1M")),
    (("demo", "--seed", "x"), ("--seed", "'x'", "whole number")),
    (("demo", "--model", "{good}", "--seed", "3"), ("--seed 3", "leave it out")),
    (("demo", "--device", "tpu"), ("--device", "'tpu'")),
    (("demo", "--chunk-tokens", "0"), ("--chunk-tokens", "'0'")),
]
_BENCH: list[Row] = [
    (("bench", "decode", *args), words)
    for args, words in (
        (("--methods", "nope"), ("'nope'", "standard")),
        (("--methods", ""), ("no methods", "name at least one")),
        (("--methods", "headinfer,"), ("--methods", "comma")),
        (("--contexts", "0"), ("--contexts", "positive")),
        (("--context", "1K", "--contexts", "2K"), ("--contexts/--context", "2 times")),
        (("--contexts", "9" * 12), ("--contexts", "more than")),
        (("--fill", "x"), ("--fill", "'x'", "'random'")),
        (("--new-tokens", "0"), ("--new-tokens", "at least 1")),
        (("--repeats", "0"), ("--repeats", "at least 1")),
        (("--time-limit", "nan"), ("--time-limit", "'nan'", "whole number")),
        (("--seed", BIG), ("--seed", "2**64 - 1")),
        (("--model", "llama-3-8b"), ("llama-3-8b", "--dummy-weights")),
        (("--dummy-weights",), ("--dummy-weights", "--model")),
        (("--dtype", "int8"), ("--dtype", "'int8'")),
        (("--layers", "0"), ("--layers", "at least 1")),
        (("--kv-heads", "0"), ("--kv-heads", "at least 1")),
        (("--heads", "3", "--kv-heads", "2"), ("--heads (3)", "--kv-heads (2)")),
        (("--intermediate-size", "x"), ("--intermediate-size", "'x'", "whole number")),
        (("--tile-heads", "0"), ("--tile-heads", "'0'")),
        (("--resume",), ("--resume", "--json")),
        (("--resume", "--json", "{cut.json}"), ("cut.json", "not JSON")),
        (("--resume", "--json", "{object.json}"), ("object.json", "no results")),
        (("--model", "{good}", "--layers", "3"), ("--layers", "--model")),
    )
]
_REST: list[Row] = [
    (("bench", "nope"), ("'nope'",)),
    (("bench", "report"), ("FILES",)),
    (("bench", "report", "{null.json}", "--out", "/no/x"), ("--out", "no folder")),
    (("bench", "methods", "x"), ("unexpected", "x")),
    (("evaluate", "nope"), ("'nope'",)),
    (("evaluate", "agreement"), ("Missing option", "--")),
    (("evaluate", "agreement", "-m", "{good}"), ("--file",)),
    (("evaluate", "agreement", "-m", "{good}", "-f", "/no"), ("'/no'", "No such file")),
    (("evaluate", "agreement", "-m", "{good}", "-f", "{latin}"), ("not UTF-8",)),
    (("evaluate", "agreement", "-m", "{good}", "-f", "{empty}"), ("is empty",)),
    (("evaluate", "agreement", "-m", "llama-3-8b", "-f", "{text}"), ("without weights",)),
    (
        ("evaluate", "agreement", "-m", "{good}", "-f", "{text}", "--contexts", "8K"),
        ("8,192", "4 tokens"),
    ),
    (("evaluate", "needle", "-m", "{good}", "--samples", "0"), ("--samples", "at least 1")),
    (("evaluate", "needle", "-m", "{good}", "--samples", "x"), ("--samples", "'x'")),
    (("evaluate", "needle", "-m", "{good}", "--depths", BIG), ("--depths", "more than 9,999")),
    (("evaluate", "needle", "-m", "{good}", "--depths", "x"), ("--depths", "'x'")),
    (("evaluate", "needle", "-m", "{good}", "--seed", BIG), ("--seed", "2**64 - 1")),
    (("evaluate", "report", "{cut.json}", "--out", "/no/x"), ("--out", "no folder")),
]

BEFORE_THE_MODEL: list[Row] = [*_SIZES, *_COUNTS, *_SHARES, *_NUMBERS, *_TOGETHER]
"""What is told before anything is loaded."""

TABLE: list[Row] = [
    *BEFORE_THE_MODEL,
    *_PROMPTS,
    *_NAMES,
    *_CONFIGS,
    *_OTHER_FILES,
    *_RUNS,
    *_PLAN,
    *_OTHERS,
    *_BENCH,
    *_REST,
]

BY_THE_COMMAND: list[Row] = [
    _option("--chunk-tokens", "999999999999", "more than"),
    _option("--seed", BIG, "2**64 - 1"),
    (("generate", "-p", "w1 \udcff"), ("not UTF-8", "character 3")),
    (("generate", "-p", "w1", "-m", LONG), ("xxx...xxx", "neither")),
    (("generate", "-f", "{latin}"), ("not UTF-8",)),
    _model("null-config", "config.json", "null"),
    _model("kv-0", "num_key_value_heads"),
    _model("template-type", "chat template", "--raw"),
    _model("beams-words", "num_beams"),
    (("plan", "--hardware", "h100"), ("'h100'", "h100-80gb")),
    (("bench", "decode", "--methods", "nope"), ("'nope'",)),
    (("evaluate", "nope"), ("'nope'",)),
    (("nope",), ("'nope'",)),
]
