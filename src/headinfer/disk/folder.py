"""The folder that a user names for a disk cache: whether it can be used."""

import os

from headinfer.errors import OptionError


def check_folder(folder: str) -> None:
    """Refuse a folder that cannot take the file of a disk cache.

    Args:
        folder: as the user named it.

    Raises:
        OptionError: it is not there, is no folder, or may not be written.
    """
    named = f"disk_cache {folder!r}"
    if not os.path.isdir(folder):
        found = "is a file" if os.path.exists(folder) else "is not there"
        raise OptionError(f"{named} {found}; give a folder on a fast disk, or make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{named} may not be written; give a folder that you can write to")
