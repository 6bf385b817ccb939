"""The folder that a user names for a disk cache: whether it can be used."""

import os

from headinfer.errors import OptionError
from headinfer.folders import describe


def check_folder(folder: str, option: str = "disk_cache") -> None:
    """Refuse a folder that cannot take the file of a disk cache.

    Args:
        folder: as the user named it.
        option: that the user named it with.

    Raises:
        OptionError: it is not there, is no folder, cannot be looked at, or may not be written.
    """
    named = f"{option} {folder!r}"
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise OptionError(
            f"{named} is not there; give a folder on a fast disk, or make it first"
        ) from None
    except ValueError:  # a zero byte
        raise OptionError(f"{named} names no folder; give a folder on a fast disk") from None
    except OSError as error:
        raise OptionError(f"{named} cannot be used: {describe(error)}") from None
    if not os.path.isdir(folder):
        raise OptionError(f"{named} is a file; give a folder on a fast disk")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"{named} may not be written; give a folder that you can write to")
