"""A model's own JSON files, read before transformers does: what is wrong in one is named.

transformers takes much of what they say as it is, and stops where Python cannot go on.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from headinfer.errors import ModelLoadError
from headinfer.folders import describe

_AT_LEAST_1 = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_WHOLE = ("max_position_embeddings", "intermediate_size", "sliding_window")
_TEXT = "text_config"

_GENERATION = "generation_config.json"
_FILES = ("config.json", _GENERATION, "tokenizer_config.json", "tokenizer.json")
_KINDS = {list: "a list", str: "a text", bool: "true or false"}


def _is_whole(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_counted(value: object) -> bool:
    return _is_whole(value, 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return all(_is_whole(each, -1) for each in (value if isinstance(value, list) else [value]))


def _are_texts(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(each, str) and each for each in texts)


def _is_list(value: object) -> bool:
    return isinstance(value, list)


SETTINGS: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        ("num_beams", "max_new_tokens", "max_length", "prompt_lookup_num_tokens"),
        (_is_counted, "a whole number of at least 1"),
    ),
    **dict.fromkeys(
        ("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"),
        (_is_whole, "a whole number of at least 0"),
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty", "max_time"),
        (_is_number, "a number"),
    ),
    **dict.fromkeys(
        ("eos_token_id", "pad_token_id", "bos_token_id"), (_are_ids, "a token id, or several")
    ),
    **dict.fromkeys(
        ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), (_is_list, "a list")
    ),
    "stop_strings": (_are_texts, "a text, or several, and none of them empty"),
}
"""Values of a generation config that end in an error of Python where they are of another kind."""


def check_config(name: str, location: str) -> None:
    """Check the values of a model's config.json that transformers takes without a look.

    Args:
        name: of the model, for messages.
        location: its folder, or its id in a hub; a config that is not here is left alone.

    Raises:
        ModelLoadError: names the value, and what it must be.
    """
    file = _file(location, "config.json")
    if file is None:
        return
    values = _read(name, file)
    _check_kind(name, values)
    _check_values(name, values)
    part = values.get(_TEXT)
    if isinstance(part, Mapping):
        _check_values(name, part)


def check_files(name: str, location: str) -> None:
    """Check that a model's JSON files can be read, once it did not load.

    Raises:
        ModelLoadError: names the file, and what is wrong.
    """
    for each in _FILES:
        file = _file(location, each)
        if file is not None:
            _read(name, file)


def check_generation_config(name: str, location: str) -> None:
    """Check a model's generation config, which transformers leaves out where it cannot be read.

    Raises:
        ModelLoadError: it cannot be read, or a value is of a kind that no option takes.
    """
    file = _file(location, _GENERATION)
    if file is None:
        return
    values = _read(name, file)
    for key, (is_right, wanted) in SETTINGS.items():
        value = values.get(key)
        if value is not None and not is_right(value):
            raise _wrong(name, key, value, wanted, _GENERATION)


def _file(location: str, file_name: str) -> Path | None:
    """Return a file of a model, if it is on this machine."""
    folder = Path(location)
    if folder.is_dir():
        file = folder / file_name
        return file if file.exists() else None
    from transformers.utils import cached_file

    with suppress(Exception):  # no such model, or no such file
        found = cached_file(location, file_name, local_files_only=True)
        return None if found is None else Path(found)
    return None


def _read(name: str, file: Path) -> Mapping[str, Any]:
    """Return what a JSON file holds."""
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelLoadError(
            f"model {name!r}: {file.name} cannot be read: {describe(error)}"
        ) from error
    except ValueError as error:
        what = "UTF-8 text" if isinstance(error, UnicodeError) else f"JSON ({error})"
        raise ModelLoadError(
            f"model {name!r}: {file.name} is not {what}; fetch it again"
        ) from error
    if not isinstance(values, Mapping):
        kind = "null" if values is None else _KINDS.get(type(values), "a number")
        raise ModelLoadError(
            f"model {name!r}: {file.name} holds {kind}, not names and values; fetch it again"
        )
    return values


def _check_kind(name: str, values: Mapping[str, Any]) -> None:
    model_type, classes = values.get("model_type"), values.get("architectures")
    if model_type is None and not values.get("auto_map"):
        raise ModelLoadError(
            f"model {name!r}: config.json names no model_type, so that nobody knows what model it "
            "is; fetch the file again"
        )
    if model_type is not None and not isinstance(model_type, str):
        raise _wrong(name, "model_type", model_type, 'a name, such as "llama"')
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(each, str) for each in classes)
    ):
        raise _wrong(name, "architectures", classes, "a list of names of classes")


def _check_values(name: str, values: Mapping[str, Any]) -> None:
    for key in _AT_LEAST_1:
        _check_number(name, values, key, 1)
    for key in _WHOLE:
        _check_number(name, values, key, 0)
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        divisor = f"a divisor of num_attention_heads, which is {heads}"
        raise _wrong(name, "num_key_value_heads", kv_heads, divisor)
    for key in ("dtype", "torch_dtype"):
        _check_dtype(name, values, key)


def _check_number(name: str, values: Mapping[str, Any], key: str, least: int) -> None:
    value = values.get(key)
    if value is None or isinstance(value, list):  # some models have one for each layer
        return
    if not _is_whole(value, least):
        raise _wrong(name, key, value, f"a whole number of at least {least}")


def _check_dtype(name: str, values: Mapping[str, Any], key: str) -> None:
    import torch

    value = values.get(key)
    if value is None or isinstance(value, Mapping):  # some models have one for each part
        return
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    if value != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise _wrong(name, key, value, "float32, bfloat16 or float16")


def _wrong(
    name: str, key: str, value: object, wanted: str, file: str = "config.json"
) -> ModelLoadError:
    return ModelLoadError(
        f"model {name!r}: {key} in its {file} must be {wanted}, not {value!r}; correct it, or "
        "fetch the file again"
    )
