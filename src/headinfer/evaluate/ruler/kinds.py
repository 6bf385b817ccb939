"""The tasks of RULER by name, and the files that some of them need. Pure Python."""

from dataclasses import dataclass
from pathlib import Path

from headinfer.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source of text that RULER does not make up.

    Attributes:
        name: of a file or folder in the data folder.
        fetch: where it is to be had.
    """

    name: str
    fetch: str


ESSAYS = Source(
    name="PaulGrahamEssays.json",
    fetch="made by RULER's scripts/data/synthetic/json/download_paulgraham_essay.py",
)
SQUAD = Source(
    name="dev-v2.0.json",
    fetch="https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
)
HOTPOT = Source(
    name="hotpot_dev_distractor_v1.json",
    fetch="https://huggingface.co/datasets/namlh2004/hotpotqa",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A task of RULER.

    Attributes:
        name: the harness's.
        new_tokens: the most tokens of an answer.
        source: the text it needs; None where it makes up all of it.
    """

    name: str
    new_tokens: int = 128
    source: Source | None = None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="niah_single_1"),
        Kind(name="niah_single_2", source=ESSAYS),
        Kind(name="niah_single_3", source=ESSAYS),
        Kind(name="niah_multikey_1", source=ESSAYS),
        Kind(name="niah_multikey_2"),
        Kind(name="niah_multikey_3"),
        Kind(name="niah_multivalue", source=ESSAYS),
        Kind(name="niah_multiquery", source=ESSAYS),
        Kind(name="ruler_vt", new_tokens=30),
        Kind(name="ruler_cwe", new_tokens=120),
        Kind(name="ruler_fwe", new_tokens=50),
        Kind(name="ruler_qa_squad", new_tokens=32, source=SQUAD),
        Kind(name="ruler_qa_hotpot", new_tokens=32, source=HOTPOT),
    )
}
"""All tasks by name, in RULER's order."""

OFFLINE = tuple(name for name, kind in KINDS.items() if kind.source is None)
"""Tasks that need no files."""

_SHORT = {name.removeprefix("ruler_"): name for name in KINDS}


def parse_kinds(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list; "offline" and "all" stand for several.

    Raises:
        OptionError: there is no such task, or one is named twice.
    """
    if text in ("all", "offline"):
        return tuple(KINDS) if text == "all" else OFFLINE
    names = []
    for part in text.split(","):
        name = part.strip()
        name = _SHORT.get(name, name)
        if name not in KINDS:
            known = ", ".join((*KINDS, "offline", "all"))
            raise OptionError(f"RULER has no task {name!r}; choose among {known}")
        names.append(name)
    check_kinds(names)
    return tuple(names)


def check_kinds(names: list[str] | tuple[str, ...]) -> None:
    """Check that there are tasks, each named once.

    Raises:
        OptionError: there are none, or one is named twice.
    """
    if not names or len(set(names)) < len(names):
        raise OptionError(f"tasks of RULER are named once each, and at least one, not {names}")


def check_files(names: tuple[str, ...], folder: str | None) -> None:
    """Check that the data folder has what tasks need.

    Raises:
        OptionError: says what to fetch, and where to put it.
    """
    for name in names:
        source = KINDS[name].source
        if source is None:
            continue
        if folder is None:
            raise OptionError(
                f"{name} needs {source.name} ({source.fetch}); put it into a folder and give that "
                "with --data, or choose --tasks offline"
            )
        if not (Path(folder) / source.name).is_file():
            raise OptionError(
                f"{name} needs {source.name}, which is not in {folder!r}; fetch it "
                f"({source.fetch}) and put it there"
            )
