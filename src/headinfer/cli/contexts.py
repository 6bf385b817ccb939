"""`--contexts`: several token counts in one option."""

from headinfer.errors import OptionError
from headinfer.units import parse_tokens


def parse_contexts(text: str, example: str) -> list[int]:
    """Return token counts that are separated by commas, in the order given.

    Args:
        text: what the user wrote.
        example: of how to write them.

    Raises:
        OptionError: there are none, one is empty, or one does not parse.
    """
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise OptionError(f"--contexts {text!r} names none; write for example {example}")
    if not all(parts):
        raise OptionError(f"--contexts {text!r} has a comma too many; write for example {example}")
    return [parse_tokens(part, "--contexts") for part in parts]
