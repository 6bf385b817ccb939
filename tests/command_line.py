"""The command line, run in the process of the tests, and what it said."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("headinfer: ")]

    @property
    def answers(self) -> list[str]:
        return self.out.splitlines()

    def rows(self, label: str) -> list[str]:
        """Return what `/stats` said behind a label, each time."""
        return [
            line.removeprefix(label).strip()
            for line in self.err.splitlines()
            if line.startswith(label)
        ]


def invoked(*args: object, stdin: bytes | str | None = None) -> Outcome:
    """Run the command line in this process."""
    from typer.testing import CliRunner

    from headinfer.cli.main import app

    result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def without_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing be fetched, and errors be told as users see them."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read once at import, which another test may have been the cause of.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HEADINFER_DEBUG", raising=False)
