"""The model of a trial: the same weights for every method."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from headinfer.bench.catalogue import Spread
from headinfer.bench.model_spec import ModelSpec, NamedModel
from headinfer.bench.spec import TrialSpec
from headinfer.bench.spreading import placing, random_model
from headinfer.errors import HeadInferError, ModelLoadError, OptionError, reason_of
from headinfer.generation.gpus import Gpus
from headinfer.generation.quantised import check_packable, quantisation
from headinfer.integration.checkpoint import load_checkpoint
from headinfer.plan.options import Options

_INIT_GAIN = 1.75
"""Weights of this standard deviation over the root of the width give attention scores one of 3, so
that heads attend sharply. With stock's 0.02 attention over 32K tokens averages to nearly nothing,
and a lost tile would pass the comparison."""


def torch_device(settings: Options) -> torch.device:
    """Return where the model goes.

    Raises:
        OptionError: CUDA is asked for and not there.
    """
    name = settings.device
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda' was asked for, but CUDA is not available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda" if name == "cuda" else "cpu")


def used_devices(spec: TrialSpec) -> list[torch.device]:
    """Return where this process computes in a trial: several GPUs where layers are spread.

    Raises:
        OptionError: CUDA is asked for and not there, or there are fewer GPUs.
    """
    if spec.spread is Spread.LAYERS:
        Gpus(spec.gpus, ()).prepare()
    device = torch_device(spec.settings)
    if device.type != "cuda":
        return [device]
    Gpus(spec.gpus, ()).check("cuda")
    if spec.spread is Spread.LAYERS:
        return [torch.device("cuda", gpu) for gpu in range(spec.gpus)]
    return [torch.device("cuda", torch.cuda.current_device())]


def build_model(spec: TrialSpec, device: torch.device) -> tuple[PreTrainedModel, str | None]:
    """Return the model of a trial, in eval mode; random weights are made where they stay.

    In a run with several GPUs it lies on them as the method's spread says. Random weights are then
    the same however it does, and otherwise those that torch draws from the seed.

    Returns:
        The model, and what a reader must know about its checkpoint, if anything.

    Raises:
        ModelLoadError: a model with weights of its own cannot be loaded, or lacks some.
    """
    dtype = getattr(torch, spec.dtype)
    model = spec.model
    if isinstance(model, NamedModel) and model.location is not None:
        return _load(spec, model, model.location, device)
    torch.manual_seed(spec.seed)
    config = _config(spec)
    if spec.gpus > 1:
        return random_model(spec, config, device, _stock_attention(config)), None
    with device:
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_stock_attention(config)
        )
    return built.to(device).eval(), None


def _load(
    spec: TrialSpec, model: NamedModel, location: str, device: torch.device
) -> tuple[PreTrainedModel, str | None]:
    name = model.name
    keywords: dict[str, Any] = {"attn_implementation": _saved_attention(location)}
    try:
        if model.load_in is not None:  # quantised weights are made where they stay
            config = AutoConfig.from_pretrained(location)
            keywords["quantization_config"] = quantisation(model.load_in, config, spec.dtype)
            keywords["device_map"] = {"": device}
        if spec.spread is not Spread.ONE:
            keywords |= placing(spec, AutoConfig.from_pretrained(location), device)
        loaded, note = load_checkpoint(name, location, dtype=getattr(torch, spec.dtype), **keywords)
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise ModelLoadError(f"model {name!r} cannot be loaded: {reason}") from error
    if model.load_in is not None:
        check_packable(name, loaded)
    stays = model.load_in is not None or spec.spread is not Spread.ONE
    return (loaded if stays else loaded.to(device)).eval(), note


def _stock_attention(config: Any) -> str:
    """Return the attention that stock methods have: sdpa where it computes what the model is.

    It has no bound of scores (Gemma 2). Transformers 5.17 passes over that without a word, and
    newer releases refuse it.
    """
    text = config.get_text_config(decoder=True)
    return "sdpa" if getattr(text, "attn_logit_softcapping", None) is None else "eager"


def _saved_attention(location: str) -> str:
    try:
        config = AutoConfig.from_pretrained(location)
    except Exception:  # loading the model tells what is wrong
        return "sdpa"
    return _stock_attention(config)


def _config(spec: TrialSpec) -> Any:
    model = spec.model
    if isinstance(model, ModelSpec):
        config: Any = LlamaConfig(
            num_hidden_layers=model.layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            tie_word_embeddings=False,
        )
    else:
        try:
            config = AutoConfig.for_model(**(model.config or {}))
        except (TypeError, ValueError, KeyError) as error:
            raise HeadInferError(f"model {model.name!r} cannot be made: {error}") from error
        config.quantization_config = None  # random weights are of the run's dtype
    text = config.get_text_config(decoder=True)
    text.initializer_range = _INIT_GAIN / text.hidden_size**0.5
    text.max_position_embeddings = max(
        getattr(text, "max_position_embeddings", 0) or 0, spec.all_tokens
    )
    return config
