"""Weights that are quantised while they are loaded, by bitsandbytes: on the CPU and on CUDA alike.

transformers has other libraries for it. On 2 cores and with 135M parameters, a pass of 1 token took
0.35 s in 4 bits by bitsandbytes and 0.77 by quanto. In 8 bits it took 0.21 s, 1.97 by quanto and
1.81 by torchao, whose 4 bits have no kernel for the CPU.

docs/models.md has what quantised weights cost.
"""

from importlib.util import find_spec
from typing import Any

from headinfer.errors import ModelLoadError, OptionError

LOAD_IN = ("4bit", "8bit")
"""What weights can be quantised to."""

_LIBRARY = "bitsandbytes"

_BLOCK = (32, 64)
"""Rows and columns that bitsandbytes packs together for processors that multiply in bfloat16."""


def check_load_in(given: str | None) -> str | None:
    """Return what weights are to be quantised to, if anything.

    Raises:
        OptionError: there is no such form.
    """
    if given is not None and given not in LOAD_IN:
        raise OptionError(f"load_in must be one of {', '.join(LOAD_IN)}, not {given!r}")
    return given


def check_library(load_in: str) -> None:
    """Refuse to quantise without the library for it.

    Raises:
        ModelLoadError: says how to install it.
    """
    if find_spec(_LIBRARY) is None:
        raise ModelLoadError(f"weights in {load_in} need {_LIBRARY}: pip install {_LIBRARY}")


_NEEDED: dict[str, tuple[tuple[str, str], ...]] = {
    "aqlm": (("aqlm", "aqlm"),),
    "auto-round": (("auto_round", "auto-round"),),
    "awq": (("gptqmodel", "gptqmodel"),),
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "gptq": (("optimum.gptq", "optimum"), ("gptqmodel", "gptqmodel")),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "quark": (("quark", "amd-quark"),),
    "torchao": (("torchao", "torchao"),),
    "vptq": (("vptq", "vptq"),),
}
"""The modules that transformers loads quantised checkpoints with, and the packages they are in."""


def check_installed(name: str, config: Any) -> None:
    """Refuse a quantised checkpoint without the libraries for it.

    Args:
        name: of the model, for messages.
        config: the model's.

    Raises:
        ModelLoadError: says what to install.
    """
    method = quantised_by(config) or ""
    lacking = [package for module, package in _NEEDED.get(method, ()) if not _is_there(module)]
    if lacking:
        raise ModelLoadError(
            f"model {name!r} is quantised by {method}, which needs {' and '.join(lacking)}: "
            f"pip install {' '.join(lacking)}"
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def check_quantisable(name: str, load_in: str, config: Any) -> None:
    """Refuse to quantise a model that is so already.

    Args:
        name: of the model, for messages.
        load_in: one of `LOAD_IN`.
        config: the model's.

    Raises:
        ModelLoadError: says what to do.
    """
    if method := quantised_by(config):
        raise ModelLoadError(
            f"model {name!r} is quantised already, by {method}; load it as it is, not in {load_in}"
        )


def quantised_by(config: Any) -> str | None:
    """Return the method by which a checkpoint's weights are quantised, after its config."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    values = settings if isinstance(settings, dict) else vars(settings)
    method = values.get("quant_method")
    return str(getattr(method, "value", method) or "a method it does not name")


def quantisation(load_in: str, config: Any, dtype: str) -> Any:
    """Return how transformers is to quantise the matrices of a model's layers.

    4 bits are NF4: a float32 scale for each 64 weights. 8 bits have a scale for each row, and so
    have their inputs. LLM.int8 would keep columns with large inputs in 16 bits. It chooses them by
    all tokens of a pass, so that a prompt in chunks would give other results than the whole.
    Experts stay as they are.

    Args:
        load_in: one of `LOAD_IN`.
        config: the model's.
        dtype: in which it computes: a torch dtype's name, or "auto" for the config's.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    named = config.get_text_config(decoder=True).dtype or config.dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=named if dtype == "auto" else getattr(torch, dtype),
    )


def check_packable(name: str, model: Any) -> None:
    """Refuse matrices in 4 bits that bitsandbytes fails to pack for this CPU, once it computes.

    Args:
        name: of the model, for messages.
        model: quantised.

    Raises:
        ModelLoadError: names the first one.
    """
    for where, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        sizes = (module.out_features, module.in_features)
        if module.weight.device.type == "cpu" and any(
            size % block for size, block in zip(sizes, _BLOCK, strict=True)
        ):
            raise ModelLoadError(
                f"model {name!r} cannot be had in 4bit on this CPU: {where} is of {sizes[0]} x "
                f"{sizes[1]}, not of multiples of {_BLOCK[0]} x {_BLOCK[1]}; take 8bit"
            )


def has_fused_experts(model: Any) -> bool:
    """Whether a model has all experts of a layer in one parameter, which is not quantised."""
    return any(weight.ndim > 2 and weight.is_floating_point() for weight in model.parameters())
