"""Result files, which a run that is stopped leaves whole and can go on with. Pure Python."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from headinfer.errors import OptionError
from headinfer.scratch import scratch_folder

Results = TypeVar("Results", bound="ResultFile")


class Asked(Protocol):
    """A dataclass that says which methods and contexts are asked for."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of methods."""

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens."""


Spec = TypeVar("Spec", bound=Asked)


class ResultFile(ABC):
    """A record of results that a JSON file holds.

    Attributes:
        version: the `format` in the header that is read and written.
        verb: of the command line that writes such files.
    """

    __slots__ = ()

    version: ClassVar[int]
    verb: ClassVar[str]

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of a result file."""

    @classmethod
    @abstractmethod
    def from_json(cls: type[Results], values: Mapping[str, Any]) -> Results:
        """Return the results that `to_json` gave."""

    def save(self, path: str) -> None:
        """Replace a file by these results.

        Raises:
            OptionError: it cannot be written; the old file stays.
        """
        replace_json(path, self.to_json(), remedy="make room, then go on with --resume")

    @classmethod
    def load(cls: type[Results], path: str) -> Results:
        """Return what a file holds.

        Raises:
            OptionError: it cannot be read, or is no result file of this format.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "it is not JSON"
            raise OptionError(f"results {path!r} cannot be read: {reason}") from error
        try:
            found = values["header"]["format"]
            if found != cls.version:
                raise OptionError(
                    f"results {path!r} have format {found}, and {cls.version} is read; measure "
                    "them again"
                )
            return cls.from_json(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"{path!r} holds no results of `headinfer {cls.verb}`") from error


_MACHINE = ("cpu", "gpu", "host_memory_bytes")
"""What of a header's `hardware` tells one machine from another."""


def check_continues(old: Mapping[str, Any], new: Mapping[str, Any], *, but: Set[str]) -> None:
    """Check that the rows of a new run belong into the file of an old one.

    Args:
        old: header of the file.
        new: what the header of the new run would be.
        but: names in the header's `spec` that may be others.

    Raises:
        OptionError: they do not: another verb, program or machine, or other values in the `spec`.
    """
    if new["command"] != old["command"]:
        raise OptionError(
            f"--resume: the file holds results of {old['command']}, not of {new['command']}; "
            "give another --json"
        )
    for what, names, before, now in (
        ("versions", ("versions",), old, new),
        ("commit", ("commit",), old, new),
        ("device", ("device",), old, new),
        ("hardware", _MACHINE, old["hardware"], new["hardware"]),
    ):
        if any(before.get(name) != now.get(name) for name in names):
            raise OptionError(
                f"--resume: the results were measured with other {what}; "
                "give another --json, or leave out --resume to begin anew"
            )
    before, now = old["spec"], new["spec"]
    for name in dict.fromkeys((*before, *now)):
        if name not in but and before.get(name) != now.get(name):
            raise OptionError(
                f"--resume: {name} was {before.get(name)!r} in the results and is "
                f"{now.get(name)!r} now; give another --json, or leave out --resume to begin anew"
            )


def joined(now: Spec, before: Spec) -> Spec:
    """Return what a run asks for that goes on with another: the methods and contexts of both."""
    return replace(
        now,
        methods=tuple(dict.fromkeys((*now.methods, *before.methods))),
        contexts=tuple(sorted({*now.contexts, *before.contexts})),
    )


def replace_json(path: str, values: Mapping[str, Any], *, remedy: str) -> None:
    """Write a file beside the old one and rename it, so that nobody reads half of it.

    A link stays one, and the file that it leads to is written.

    Args:
        path: of the file.
        values: its content.
        remedy: what the user can do where it cannot be written.

    Raises:
        OptionError: it cannot be written; the old file stays.
    """
    text = json.dumps(values, indent=1) + "\n"
    old = Path(os.path.realpath(path))
    try:
        with scratch_folder(old.parent) as folder:
            new = folder / old.name
            new.write_text(text, encoding="utf-8")
            os.replace(new, old)
    except OSError as error:
        raise OptionError(
            f"results cannot be written to {path!r} ({error.strerror}); {remedy}"
        ) from error


def check_replaceable(path: str) -> None:
    """Check that `ResultFile.save` can write a file, as far as that can be known before.

    Raises:
        OptionError: it is a device or a pipe, or nothing can be written beside it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OptionError(f"results {path!r} must be a file, which is replaced after each row")
    try:
        with scratch_folder(Path(os.path.realpath(path)).parent):
            pass
    except OSError as error:
        raise OptionError(
            f"results {path!r} are written beside the old ones, and nothing can be written there "
            f"({error.strerror}); choose another folder"
        ) from error
