"""The options are declared once: keywords, flags and records are those of the fields."""

import inspect
import json
from typing import Any

import pytest
import typer

import headinfer
from headinfer.cli.main import app
from headinfer.errors import OptionError
from headinfer.plan.options import DECLARATIONS, Options
from tiny_models import shared_model

NO_OPTIONS = {"progress", "simulated_device"}
"""Keywords of `attach` that take objects, which neither a flag nor a record could."""


def test_attach_has_a_keyword_for_each_option() -> None:
    parameters = list(inspect.signature(headinfer.attach).parameters.values())[1:]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters)
    keywords = {part.name: part.default for part in parameters if part.name not in NO_OPTIONS}
    assert keywords == {name: declared.default for name, declared in DECLARATIONS.items()}
    documented = inspect.getdoc(headinfer.attach)
    assert all(f"\n    {name}: " in documented for name in keywords)


@pytest.mark.parametrize("name", DECLARATIONS)
def test_attach_hands_each_option_on(name: str) -> None:
    with pytest.raises(OptionError, match=name):
        headinfer.attach(shared_model("llama3"), **{name: object()})


def test_generate_has_a_flag_for_each_option() -> None:
    parameters = typer.main.get_command(app).commands["generate"].params
    flags = {option: parameter for parameter in parameters for option in parameter.opts}
    for name, declared in DECLARATIONS.items():
        switch = declared.default is True
        flag = flags[f"--{'no-' if switch else ''}{name.replace('_', '-')}"]
        assert (flag.help, flag.metavar) == (declared.help, declared.metavar)
        assert flag.is_flag == switch
        given = not flag.default if switch else flag.default
        assert declared.parse(name, given) == declared.default


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"device_memory": "24GB", "host_memory": "1.5GiB", "chunk_tokens": "4K"},
        {"device_memory": "1000000007", "tile_heads": "all", "tile_tokens": "1K"},
        {"resident_tokens": "0", "host_attention": "off", "overlap": False, "device": "cpu"},
        {"resident_tokens": "all", "host_attention": "0.25", "tile_heads": 2, "capture": False},
    ],
)
def test_options_are_taken_back_as_they_are_written(given: dict[str, Any]) -> None:
    options = Options.parse(**given)
    assert Options.parse(**json.loads(json.dumps(options.keywords()))) == options


def test_sizes_are_recorded_as_people_write_them() -> None:
    written = Options.parse(device_memory="24GiB", host_memory="24GB").keywords()
    assert (written["device_memory"], written["host_memory"]) == ("24GiB", "24GB")
    assert Options.parse(device_memory="1000000007").keywords()["device_memory"] == "1000000007B"


def test_an_option_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(OptionError, match=r"no option 'tile_head'; the options are .*tile_heads"):
        Options.parse(tile_head=1)
