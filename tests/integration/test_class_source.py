"""The source of a class is what `inspect` finds, at less cost."""

import functools
import inspect
import sys
from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama
from transformers.models.reformer import modeling_reformer
from transformers.models.roberta import modeling_roberta

from headinfer.integration.class_source import class_source


class Outer:
    class Inner:
        word = "inner"

    def method(self) -> type:
        @functools.total_ordering
        class Local:
            def __lt__(self, _other: object) -> bool:
                return True

        return Local


@pytest.mark.parametrize("module", [modeling_llama, modeling_reformer, modeling_roberta])
def test_classes_of_models(module: ModuleType) -> None:
    own = [each for each in vars(module).values() if inspect.isclass(each)]
    own = [each for each in own if each.__module__ == module.__name__]
    own = [each for each in own if not issubclass(each, tuple)]  # made without a source
    assert len(own) > 5
    for each in own:
        assert class_source(each, ["class"]) == inspect.getsource(each)


@pytest.mark.parametrize("found", [Outer, Outer.Inner, Outer().method()])
def test_classes_within_others(found: type) -> None:
    assert class_source(found, ["word"]) == inspect.getsource(found)


def test_a_file_without_the_words_is_not_looked_into() -> None:
    assert class_source(torch.nn.Linear, ["past_key_" + "values"]) == ""
    assert class_source(torch.nn.Linear, ["bias"]).startswith("class Linear(")


def test_what_has_no_source_is_empty() -> None:
    made = type("Made", (), {"__module__": sys.__name__})
    assert class_source(made, ["class"]) == ""
    assert class_source(type("Made", (), {}), ["class"]) == ""
    assert class_source(type("Made", (), {"__module__": "nowhere"}), ["class"]) == ""
