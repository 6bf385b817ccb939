"""Where HeadInfer keeps what it builds on a user's machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/headinfer` or `~/.cache/headinfer`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headinfer"
