"""The help says which options are off without a value."""

import pytest
from typer.testing import CliRunner

from headinfer.cli.main import app


@pytest.mark.parametrize(
    ("flag", "following"), [("--disk-cache", "--chunk-tokens"), ("--head-pattern", "--sink-tokens")]
)
def test_an_option_that_is_off_has_no_default_named_auto(flag: str, following: str) -> None:
    shown = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "100"}).output
    options = shown[shown.index("Memory") :]
    of_one = options[options.rindex(f"│ {flag} ") : options.rindex(f"│ {following} ")]
    assert "default" not in of_one
