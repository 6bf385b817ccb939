"""Errors a user of HeadInfer can cause; each says what was received, the limit, and the remedy."""


class HeadInferError(Exception):
    """Base of every error raised for a condition the caller can change."""


class OptionError(HeadInferError):
    """An option does not parse or lies outside its range."""


class UnsupportedModelError(HeadInferError):
    """The model, or the way it is called, cannot be served exactly."""


class ModelLoadError(HeadInferError):
    """The model or its tokenizer cannot be loaded."""


class NotANumberError(HeadInferError):
    """The model computes NaN or infinity where numbers should be."""


class MemoryPlanError(HeadInferError):
    """A plan does not fit the device or the host memory."""


class CacheStateError(HeadInferError):
    """A cache is used after it was closed, or with a model it was not made for."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator says so in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)
