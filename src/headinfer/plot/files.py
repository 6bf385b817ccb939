"""What must hold before a plot is worth computing; imports no matplotlib."""

from importlib.util import find_spec
from pathlib import Path

from headinfer.errors import OptionError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Check that a plot can be drawn in the format that a file name asks for.

    Raises:
        OptionError: the suffix is of no known format, or matplotlib is not installed.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path!r} must end in {', '.join(SUFFIXES)}, not {suffix!r}")
    if find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib; install it with: pip install matplotlib")
