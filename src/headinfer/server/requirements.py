"""What the server needs beside the package itself, and the command that installs it."""

from importlib.util import find_spec

from headinfer.errors import OptionError

_NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
"""Modules of the extra `serve`."""


def check_installed() -> None:
    """Raise unless all that the server needs is installed.

    Raises:
        OptionError: names what is missing, and how to install it.
    """
    missing = [name.replace("_", "-") for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"the server needs {', '.join(missing)}, not installed here: "
            "pip install 'headinfer[serve]'"
        )
