"""What verifications accept of drafts, recorded from real models. Pure Python, never torch.

Random weights accept what chance has. So a benchmark of a shape replays what real models accepted,
or takes a number that is stated.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.folders import describe
from headinfer.generation.pace import MOST_DRAFTED
from headinfer.units import counted

_DRAFTER = "itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A record of verifications.

    Attributes:
        drafts: that each verified.
        accepted: drafts that were right, for each verification in order; never empty.
        models: whose verifications they are; none where the number is only stated.
    """

    drafts: int
    accepted: tuple[int, ...]
    models: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Drafts that were accepted on average."""
        return sum(self.accepted) / len(self.accepted)

    @property
    def note(self) -> str:
        """What a reader of numbers by it must know."""
        if not self.models:
            return (
                f"acceptance stated, not measured: {self.mean:g} of {counted(self.drafts, 'draft')}"
            )
        return (
            f"acceptance replayed: {self.mean:.1f} of {counted(self.drafts, 'draft')} in "
            f"{counted(len(self.accepted), 'verification')} of {', '.join(self.models)}"
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> "Replay | None":
        """Return the record that was written as JSON values; None for none."""
        if values is None:
            return None
        return cls(
            drafts=values["drafts"],
            accepted=tuple(values["accepted"]),
            models=tuple(values["models"]),
        )

    @classmethod
    def parse(cls, text: str) -> "Replay":
        """Return what a user gave: `4/7` for 4 of 7 drafts each time, or the path of a record.

        Raises:
            OptionError: there is no such file, it is no record, or more would be accepted than
                drafted.
        """
        stated = re.fullmatch(r"(\d{1,3})/(\d{1,3})", text)
        if stated is None:
            return cls.read(text)
        accepted, drafts = map(int, stated.groups())
        if not accepted <= drafts <= MOST_DRAFTED or not drafts:
            raise OptionError(
                f"--replay {text}: give how many of 1 to {MOST_DRAFTED} drafts are accepted, "
                "as in 4/7"
            )
        return cls(drafts=drafts, accepted=(accepted,), models=())

    @classmethod
    def read(cls, path: str) -> "Replay":
        """Return the record in a file of `benchmarks/drafts.py`: of models that drafted themselves.

        Raises:
            OptionError: it cannot be read, or is no such file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = [row for row in values["rows"] if row["drafter"] == _DRAFTER]
            accepted = [each for row in rows for place in row["accepted"] for each in place]
            drafts = int(values["header"]["settings"]["drafts"])
            models = dict.fromkeys(str(row["model"]) for row in rows)
        except OSError as error:
            raise OptionError(f"--replay {path!r} cannot be read: {describe(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"--replay {path!r} is no file of benchmarks/drafts.py, which measures acceptance"
            ) from error
        if not accepted:
            raise OptionError(f"--replay {path!r} has no verification of a model's own drafts")
        return cls(drafts=drafts, accepted=tuple(accepted), models=tuple(models))
