"""The shape of a model that a user names, before any weight is loaded."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headinfer.cli.load import DEMO_MODEL, NamedSource, calm_transformers
from headinfer.errors import HeadInferError, ModelLoadError, UnsupportedModelError
from headinfer.estimate.checkpoint import checkpoint_bytes
from headinfer.estimate.config import shape_from_config
from headinfer.estimate.presets import PRESETS
from headinfer.estimate.quantization import UNPACKED, load_in
from headinfer.generation.model import ModelSource, check_causal, load_config
from headinfer.gguf_models.folder import gguf_file, is_gguf_model
from headinfer.gguf_models.unpack import read_config
from headinfer.plan.shape import ModelShape


class _ShapeSource(NamedSource):
    """A source of a shape: presets have one, too."""

    __slots__ = ()

    def known_names(self) -> tuple[str, ...]:
        """Return names that need no network."""
        return (*NamedSource.known_names(self), *PRESETS)


def shape_of(
    name: str,
    *,
    dtype: str = "auto",
    quantised: str | None = None,
    local_files_only: bool = False,
) -> ModelShape:
    """Return the shape of a model from its config alone.

    Presets, and local models of the families in `headinfer.estimate.families`, need neither torch
    nor transformers. A model of another type is built without memory for its weights.

    Args:
        name: a preset, "demo", a packaged model, a GGUF file, a folder, a config.json or a hub id.
            It is the first of these that it can be. So a folder called as a preset is given as
            "./llama-3-8b".
        dtype: "auto" for the one the config names, or a torch dtype's name.
        quantised: "4bit" or "8bit" where weights are to be quantised as they are loaded.
        local_files_only: never ask the hub.

    Raises:
        HeadInferError: there is no such model, or its shape cannot be told.
    """
    wanted = None if dtype == "auto" else dtype
    source = _ShapeSource(name=name, local_files_only=local_files_only)
    values = PRESETS[name] if name in PRESETS else _values(source)
    folder = None if name in PRESETS else _weights_folder(source)
    if quantised is not None:
        values, folder = load_in(values, quantised, name), None
    try:
        return shape_from_config(values, name=name, dtype=wanted, folder=folder)
    except UnsupportedModelError as unknown:
        stored = values.get("quantization_config")
        plain = {key: value for key, value in values.items() if key != "quantization_config"}
        shape = _shape_of_empty_model(plain, source, wanted, unknown)
        if not stored or (isinstance(stored, Mapping) and stored.get("quant_method") in UNPACKED):
            return shape
        tied = bool(values.get("tie_word_embeddings"))
        found = folder and checkpoint_bytes(folder, shape.kv_itemsize, tied=tied)
        if not found:
            raise
        return replace(shape, weights_bytes=found)


def dtype_of(name: str) -> str:
    """Return the dtype that a model's config names, or bfloat16 where it names none.

    Args:
        name: of the model, as for `shape_of`.

    Raises:
        ModelLoadError: there is no such model.
    """
    values = PRESETS[name] if name in PRESETS else _values(_ShapeSource(name=name))
    text = values.get("text_config")
    for each in (text if isinstance(text, Mapping) else {}, values):
        if named := each.get("dtype") or each.get("torch_dtype"):
            return str(named)
    return "bfloat16"


def _weights_folder(source: ModelSource) -> Path | None:
    """Return the local folder that has a model's weights, in safetensors files if any."""
    folder = Path(os.path.expanduser(source.name))
    return folder if os.path.isdir(folder) else None


def _values(source: ModelSource) -> Mapping[str, Any]:
    """Return the values of a model's config; a GGUF file of the user's is not unpacked for it."""
    if (gguf := gguf_file(source.name)) is not None:
        calm_transformers(verbose=False)
        return read_config(gguf, source.name)
    file = _config_file(source)
    return _hub_config(source) if file is None else _read(file)


def _config_file(source: ModelSource) -> Path | None:
    """Return a local model's config file; None for a model of the hub.

    Raises:
        ModelLoadError: the name can be neither.
    """
    file = Path(os.path.expanduser(source.name))
    # Functions of os.path and not of Path: those raise for names that are too long.
    if file.suffix == ".json" and not os.path.isdir(file):
        return file
    if os.path.isfile(file):
        raise ModelLoadError(f"{source.name!r} is no config: give a .json file, or its folder")
    if source.name == DEMO_MODEL or is_gguf_model(source.name):
        calm_transformers(verbose=False)  # it may have to be built or unpacked
    folder = Path(source.location())
    return folder / "config.json" if folder.is_dir() else None


def _read(file: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is not JSON ({error})"
        raise ModelLoadError(f"config {str(file)!r} cannot be read: {reason}") from error
    if not isinstance(values, Mapping):
        raise ModelLoadError(f"config {str(file)!r} holds no mapping of keys to values")
    return values


def _hub_config(source: ModelSource) -> Mapping[str, Any]:
    calm_transformers(verbose=False)
    try:
        values: Mapping[str, Any] = load_config(source).to_dict()
    except ModelLoadError as error:
        if not isinstance(error.__cause__, OSError) or str(error).endswith("?"):
            raise  # another name was meant
        known = ", ".join(PRESETS)
        raise ModelLoadError(f"{error}; these need no network: {known}") from error
    return values


def _shape_of_empty_model(
    values: Mapping[str, Any],
    source: ModelSource,
    dtype: str | None,
    unknown: UnsupportedModelError,
) -> ModelShape:
    """Return the shape of a model built on torch's meta device, where weights take no memory.

    Raises:
        HeadInferError: HeadInfer does not serve such models; or `unknown`, if transformers does not
            know them either.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from headinfer.integration.model_shape import model_shape
    from headinfer.integration.support import check_architecture

    calm_transformers(verbose=False)
    try:
        config = AutoConfig.for_model(**values)
        check_causal(source, config)
        kind = getattr(torch, dtype) if dtype else config.dtype or torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=kind)
        check_architecture(model)
        return replace(model_shape(model), name=source.name)
    except HeadInferError:
        raise
    except Exception as error:
        # Configs of unknown types are refused by transformers in many ways.
        raise unknown from error
