"""Errors a user of HeadInfer can cause; each says what was received, the limit, and the remedy."""


class HeadInferError(Exception):
    """Base of every error raised for a condition the caller can change."""


class OptionError(HeadInferError):
    """An option does not parse or lies outside its range."""


class ContextLengthError(OptionError):
    """A prompt and its answer have more tokens than the model was made for."""


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


class RanksError(HeadInferError):
    """The processes that compute a model together do not do the same, or cannot begin."""


class SessionFileError(HeadInferError):
    """A saved session cannot be written or read, or is of another model."""


class SessionRoomError(SessionFileError):
    """A session cannot be written because the disk has no room for it."""


class SessionBusyError(SessionFileError):
    """A session is being saved or read by somebody else."""


class DiskError(HeadInferError):
    """A disk cache cannot be written or read."""


class QueueFullError(HeadInferError):
    """A server has as many requests as it takes."""


class DeskClosedError(HeadInferError):
    """A server takes no requests any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator says so in words alone."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
)
"""Kinds of errors whose messages are for programmers: the kind says as much as the message."""


def is_bug(error: BaseException) -> bool:
    """Whether an error of a library is one that its authors did not foresee."""
    return isinstance(error, _BUGS) and not isinstance(error, NotImplementedError)


def reason_of(error: BaseException, most: int = 400) -> str:
    """Return all of an error's message in one line, behind its kind where nobody foresaw it.

    Args:
        error: of a library.
        most: characters; a longer message ends with a sentence before.
    """
    kind = type(error).__name__
    words = " ".join(str(error).split())
    if len(words) > most:
        end = words.rfind(". ", 0, most)
        words = words[:end] if end > 0 else f"{words[:most]} ..."
    if not words:
        return kind
    words = words.rstrip(".")
    return f"{kind}: {words}" if is_bug(error) else words
