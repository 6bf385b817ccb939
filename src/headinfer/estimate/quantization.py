"""The bytes of quantised weights, as they are once loaded, from a model's config alone.

MXFP4 is exact: blocks of 32 four-bit elements share one byte of scale, in the experts only. For the
other methods this is an approximation to about 1%. All matrices of the layers are counted as
quantised, with their scales. Embeddings, output matrix, norms, biases and routers are counted as
not quantised. Modules a checkpoint leaves out (`modules_to_not_convert`) are not looked at.
Where the files are at hand, `headinfer.estimate.checkpoint` reads what they say instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headinfer.errors import ModelLoadError
from headinfer.estimate.parameters import ParameterCount

Settings = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Bits:
    """A number of bits for each quantised element, scales included; None: not quantised."""

    projections: float | None
    experts: float | None


def _number(settings: Settings, key: str, default: int) -> int:
    value = settings.get(key, default)
    return value if isinstance(value, int) else default


def _grouped(settings: Settings) -> _Bits:
    """A 16-bit scale and a zero point of the elements' bits for each group (GPTQ, AWQ)."""
    bits, group = _number(settings, "bits", 4), _number(settings, "group_size", 128)
    each = bits + ((16 + bits) / group if group > 0 else 0)
    return _Bits(each, each)


def _bitsandbytes(settings: Settings) -> _Bits:
    """8 bits; or 4, and a float32 scale for each 64 elements, itself in 8 bits if quantised.

    Experts stay as they are: transformers has all of a layer's in one parameter.
    """
    if not (settings.get("load_in_4bit") or settings.get("_load_in_4bit")):
        return _Bits(8, None)
    scale_bits = 8 + 32 / 256 if settings.get("bnb_4bit_use_double_quant") else 32
    return _Bits(4 + scale_bits / 64, None)


def _fp8(_settings: Settings) -> _Bits:
    """8 bits, and a float32 scale for each block of 128 x 128."""
    each = 8 + 32 / 128**2
    return _Bits(each, each)


def _mxfp8(_settings: Settings) -> _Bits:
    """8 bits, and a byte of scale for each 32 elements."""
    return _Bits(8 + 8 / 32, 8 + 8 / 32)


def _mxfp4(_settings: Settings) -> _Bits:
    return _Bits(None, 4 + 8 / 32)


def _torchao(settings: Settings) -> _Bits:
    """8 bits; or 4, with a 16-bit scale and zero for each group."""
    types = settings.get("quant_type")
    kind = types.get("default") if isinstance(types, Mapping) else types
    name = str(kind.get("_type") if isinstance(kind, Mapping) else kind).lower()
    if "int4" in name:
        values = kind.get("_data") if isinstance(kind, Mapping) else None
        group = _number(values if isinstance(values, Mapping) else {}, "group_size", 128)
        return _Bits(4 + 32 / max(group, 1), None)
    if "int8" in name or "float8" in name:
        return _Bits(8, None)
    raise _UnknownError(f"torchao as {name!r}")


class _UnknownError(Exception):
    """A form of weights is one whose size is not known."""


_METHODS: dict[str, Callable[[Settings], _Bits]] = {
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "gptq": _grouped,
    "awq": _grouped,
    "auto-round": _grouped,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp8": _mxfp8,
    "torchao": _torchao,
}
"""The bits of each method; `UNPACKED` are loaded in the model's dtype."""

UNPACKED = frozenset({"compressed-tensors"})
"""Methods whose weights are unpacked when the model is first called, and stay so."""


def load_in(config: Settings, form: str, name: str) -> Settings:
    """Return the config of a model whose weights are quantised as they are loaded.

    Args:
        config: the contents of its config.json.
        form: "4bit" or "8bit".
        name: of the model, for messages.

    Raises:
        ModelLoadError: it is quantised already.
    """
    if config.get("quantization_config"):
        raise ModelLoadError(f"{name!r} is quantised already; plan for it as it is, not in {form}")
    return {
        **config,
        "quantization_config": {"quant_method": "bitsandbytes", f"load_in_{form}": True},
    }


def stored_bytes(count: ParameterCount, itemsize: int, settings: Settings, name: str) -> int:
    """Return the bytes of all parameters.

    Args:
        count: of the model.
        itemsize: bytes of a parameter that is not quantised.
        settings: the config's `quantization_config`; empty for none.
        name: of the model, for messages.

    Raises:
        ModelLoadError: the method is not known.
    """
    if not settings:
        return itemsize * count.total
    method = settings.get("quant_method")
    if method in UNPACKED:
        return itemsize * count.total
    try:
        if not isinstance(method, str) or method not in _METHODS:
            raise _UnknownError(repr(method))
        bits, plain = _METHODS[method](settings), 8 * itemsize
    except _UnknownError as error:
        raise ModelLoadError(
            f"{name!r} is quantised by {error}, whose size is not known; give the folder with its "
            f"safetensors files; known are {', '.join([*_METHODS, *sorted(UNPACKED)])}"
        ) from None
    return (
        round(count.projections * (bits.projections or plain) / 8)
        + round(count.experts * (bits.experts or plain) / 8)
        + itemsize * count.rest
    )
