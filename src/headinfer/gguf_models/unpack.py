"""Unpacking one GGUF file: transformers reads it, and what it loses is put right here.

All weights are dequantised to float32, which holds them exactly, unless another dtype is asked for.
So every method and dtype starts from the same numbers.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from headinfer.errors import HeadInferError, ModelLoadError, is_out_of_memory, reason_of
from headinfer.folders import describe
from headinfer.gguf_models.requirements import check_reader
from headinfer.gguf_models.stored import write_stored

_logger = logging.getLogger(__name__)

_MAGIC = b"GGUF"
_LAYERS_OF_GEMMA_27B = 62


def unpack(file: Path, folder: Path, name: str, dtype: str) -> None:
    """Write the model and the tokenizer of a GGUF file to a folder, as `save_pretrained` does.

    What the file stored is written beside them, for `read_stored`.

    Args:
        file: the whole model; files that are split are refused.
        folder: made if it does not exist. The folder above it is for scratch.
        name: of the model, for messages.
        dtype: of the weights: a torch dtype's name.

    Raises:
        ModelLoadError: the file cannot be read, or transformers does not read all of it.
        OSError: the folder cannot be written.
    """
    check_reader(f"model {name!r}")
    header = _Header(file, name)
    alone = _alone(file, folder.with_name("file"))
    try:
        model, tokenizer, unused = _read(alone, name, dtype)
    except Exception as error:
        raise _load_error(name, header, error) from error
    if unused is not None:
        _logger.warning("model %r: %s", name, unused)
    _begin_as_the_file_says(tokenizer, header)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_stored(folder, header.stored_bytes)


def _alone(file: Path, folder: Path) -> Path:
    """Return a file by a path in a new folder: transformers reads a tokenizer that lies beside."""
    folder.mkdir()
    link = folder / file.name
    try:
        link.symlink_to(file.absolute())
    except OSError:  # Windows lets few users make links
        shutil.copyfile(file, link)
    return link


def read_config(file: Path, name: str) -> dict[str, Any]:
    """Return the config of the model that `unpack` would write, without its weights.

    Raises:
        ModelLoadError: transformers cannot read the file.
    """
    check_reader(f"model {name!r}")
    header = _Header(file, name)
    try:
        values: dict[str, Any] = _config(file).to_dict()
    except Exception as error:
        raise _load_error(name, header, error) from error
    return values | {"dtype": "float32"}


class _Header:
    """A GGUF file's own words about the model in it.

    Attributes:
        stored_bytes: of its weights, by the file's names of their types.
    """

    def __init__(self, file: Path, name: str) -> None:
        try:
            with file.open("rb") as opened:
                magic = opened.read(len(_MAGIC))
        except OSError as error:
            raise ModelLoadError(f"model {name!r} cannot be read: {describe(error)}") from error
        if magic != _MAGIC:
            raise ModelLoadError(f"model {name!r} is no GGUF file: it does not begin with GGUF")
        from gguf import GGUFReader

        try:
            reader = GGUFReader(file)
        except Exception as error:
            # A file cut short ends in whatever numpy says of it.
            raise ModelLoadError(
                f"model {name!r} is a GGUF file that is damaged or cut short; fetch it again"
            ) from error
        self._fields = reader.fields
        self.stored_bytes: dict[str, int] = {}
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            self.stored_bytes[kind] = self.stored_bytes.get(kind, 0) + int(tensor.n_bytes)
        parts = self.value("split.count")
        if parts is not None and int(parts) > 1:
            raise ModelLoadError(
                f"model {name!r} is one of {parts} files, and transformers reads whole ones; "
                "llama-gguf-split --merge makes one of them"
            )

    def value(self, key: str) -> Any:
        """Return a value that is one number or text; None where the file has none."""
        field = self._fields.get(key)
        if field is None or not field.data:
            return None
        part = field.parts[field.data[0]]
        return bytes(part).decode(errors="replace") if part.dtype == "uint8" else part[0].item()


def _keywords(file: Path) -> dict[str, Any]:
    return {"gguf_file": file.name, "local_files_only": True}


def _config(file: Path) -> Any:
    """Return a model's config as transformers reads it, with what it does not read.

    GGUF files of Gemma 3 do not name the width that scores are scaled by. It is a head's, except in
    the model of 27B with its 62 layers.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(file.parent), **_keywords(file))
    if config.model_type == "gemma3_text":
        largest = config.num_hidden_layers == _LAYERS_OF_GEMMA_27B
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if largest else config.head_dim
    return config


def _read(file: Path, name: str, dtype: str) -> tuple[Any, Any, str | None]:
    """Return model and tokenizer as transformers reads them, and a note on what it left out."""
    import torch
    from transformers import AutoTokenizer, GgufConfig

    from headinfer.integration.checkpoint import load_checkpoint

    place, keywords = str(file.parent), _keywords(file)
    tokenizer = AutoTokenizer.from_pretrained(place, **keywords)
    # With a kernel for packed weights at hand, transformers would keep them packed.
    dense = GgufConfig(dequantize=True)
    model, unused = load_checkpoint(
        name,
        place,
        config=_config(file),
        dtype=getattr(torch, dtype),
        quantization_config=dense,
        **keywords,
    )
    return model, tokenizer, unused


def _begin_as_the_file_says(tokenizer: Any, header: _Header) -> None:
    """Let a tokenizer begin texts with its first token, if the file says so.

    transformers before 5.24 lose this of Gemma. On 4096 tokens of Python's manual its perplexity is
    11.5 with the first token and 14.6 without.
    """
    begins = header.value("tokenizer.ggml.add_bos_token")
    first = tokenizer.bos_token_id
    if begins and first is not None and tokenizer("a")["input_ids"][:1] != [first]:
        tokenizer.add_bos_token = True


def _load_error(name: str, header: _Header, error: Exception) -> Exception:
    """Return one line about a file that transformers did not take."""
    if isinstance(error, HeadInferError) or is_out_of_memory(error):
        return error
    import transformers

    kind = header.value("general.architecture")
    return ModelLoadError(
        f"model {name!r}: transformers {transformers.__version__} cannot read GGUF files of "
        f"architecture {kind!r} ({reason_of(error)}); give the model in safetensors files"
    )
