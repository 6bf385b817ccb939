"""Messages for chat templates: what the system says, and values that a template knows."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import headinfer
from headinfer.errors import OptionError
from headinfer.generation.prompt import encode_prompt
from saved_models import CHAT_TEMPLATE, make_tokenizer, save_llama

USER = {"role": "user", "content": "w1 w2"}
SYSTEM = {"role": "system", "content": "w3 w4"}

ROLES = (
    "{% if thinking is defined and not thinking %}w9 {% endif %}"
    "{% for message in messages %}{{ message.role == 'system' and 'w7' or '<user>' }} "
    "{{ message.content }} {% endfor %}{% if tools %}w8 {% endif %}<assistant>"
)
DROPS_SYSTEM = (
    "{% for message in messages if message.role != 'system' %}{{ message.content }} {% endfor %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system\\nhere') }}{% endif %}"
    + CHAT_TEMPLATE
)


def encoded(template: str, messages: list[dict[str, str]], /, **values: Any) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return str(tokenizer.decode(encode_prompt(tokenizer, messages, values)))


@pytest.mark.parametrize("message", [{"content": "w1"}, {"role": None, "content": "w1"}, {}])
def test_a_message_has_a_role(message: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"^message 1 of the prompt has no role, such as 'user'"):
        encoded(ROLES, [USER, message])


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "system", "content": None}])
def test_what_a_user_or_the_system_says_has_content(message: dict[str, Any]) -> None:
    role = message["role"]
    with pytest.raises(
        OptionError, match=rf"^message 1 of the prompt, of role '{role}', has no con"
    ):
        encoded(ROLES, [USER, message])
    encoded(ROLES, [USER, {"role": "assistant", "content": None}])  # as one that calls a tool


def test_values_reach_the_template() -> None:
    assert encoded(ROLES, [USER]) == "<user> w1 w2 <assistant>"
    assert encoded(ROLES, [USER], thinking=False) == "w9 <user> w1 w2 <assistant>"
    assert encoded(ROLES, [USER], thinking=True) == "<user> w1 w2 <assistant>"
    assert encoded(ROLES, [USER], tools=[{"name": "x"}]).endswith("w8 <assistant>")
    assert encoded(CHAT_TEMPLATE, [USER], add_generation_prompt=False) == "<user> w1 w2"


@pytest.mark.parametrize(
    "name", ["enable_thinking", "think", "tokenize", "padding", "messages", "documents", "a b"]
)
def test_values_that_no_template_would_heed(name: str) -> None:
    with pytest.raises(OptionError, match=f"has no value '{name}' to set"):
        encoded(ROLES, [USER], **{name: True})


@pytest.mark.parametrize("prompt", ["w1", [4, 5]])
def test_values_are_for_messages(prompt: Any) -> None:
    with pytest.raises(OptionError, match="for messages, which the prompt is not"):
        encode_prompt(make_tokenizer(), prompt, {"thinking": True})


def test_what_the_system_says_is_written() -> None:
    assert encoded(ROLES, [SYSTEM, USER]) == "w7 w3 w4 <user> w1 w2 <assistant>"
    # Also what the template says by itself, or the user says too.
    assert encoded("w3 w4 " + ROLES, [SYSTEM, USER]).startswith("w3 w4 w7 w3 w4")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (DROPS_SYSTEM, "leaves out the system message"),
        (REFUSES_SYSTEM, r"fails \(no system here\)"),
    ],
    ids=["drops", "refuses"],
)
def test_a_template_without_a_place_for_the_system(template: str, reason: str) -> None:
    assert encoded(template, [USER])
    with pytest.raises(OptionError, match=f"the model's chat template {reason}"):
        encoded(template, [{**SYSTEM, "content": "w1"}, USER])


def test_a_template_that_fails_as_a_program() -> None:
    with pytest.raises(OptionError, match=r"chat template fails \(.*str.*\)"):
        encoded("{{ messages[0].content + 1 }}", [USER])


def test_what_is_no_mapping_or_no_adapter_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="must be a mapping of names, not 'thinking'"):
        headinfer.generate("nowhere", [USER], chat_template_kwargs="thinking")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="adapter must be a folder or an id, not 3"):
        headinfer.generate("nowhere", "w1", adapter=3)  # type: ignore[arg-type]


def test_generate_takes_values_for_the_template(tmp_path: Path) -> None:
    save_llama(tmp_path, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = ROLES
    tokenizer.save_pretrained(tmp_path)
    for thinking, tokens in ((True, 4), (False, 5)):
        *_, last = headinfer.generate(
            *(tmp_path, [USER]),
            **{"device": "cpu", "max_new_tokens": 2},
            chat_template_kwargs={"thinking": thinking},
        )
        assert last.prompt_tokens == tokens
