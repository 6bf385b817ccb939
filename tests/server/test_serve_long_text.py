"""A text that cannot fit, whatever its tokens are, is refused before it is tokenised."""

from collections.abc import Iterator
from typing import Any

import pytest
from scripted import model_server
from server_parts import Running

from headinfer.demo.tokenizer import build_tokenizer
from tiny_models import tiny_model

TEXT = "The strongbox opens. " * 60_000


@pytest.fixture(scope="module")
def tokenised() -> list[int]:
    """Lengths of the texts that were tokenised."""
    return []


@pytest.fixture(scope="module")
def server(tokenised: list[int]) -> Iterator[Running]:
    """A server of a model that was made for 2K tokens."""
    tokenizer = build_tokenizer()
    kind = type(tokenizer)

    class Noted(kind):  # type: ignore[misc, valid-type]
        def __call__(self, text: Any, **keywords: Any) -> Any:
            tokenised.append(len(text))
            return super().__call__(text, **keywords)

    tokenizer.__class__ = Noted
    model = tiny_model("llama3", vocab_size=len(tokenizer))
    with model_server(model, tokenizer) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
        ("completions", {"prompt": TEXT}),
        ("completions", {"prompt": ["short", TEXT]}),
        ("responses", {"input": TEXT, "stream": True}),
    ],
    ids=["chat", "text", "texts", "response"],
)
def test_it_is_refused_by_its_bytes(
    server: Running, tokenised: list[int], path: str, body: dict[str, Any]
) -> None:
    refused = server.post(f"/v1/{path}", **body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "the prompt has at least 84,00" in error["message"]
    assert max(tokenised, default=0) < 100


def test_what_may_fit_is_answered(server: Running, tokenised: list[int]) -> None:
    body = {"messages": [{"role": "user", "content": TEXT[:800]}], "max_tokens": 2}
    assert server.post("/v1/chat/completions", **body).status_code == 200
    assert tokenised[-1] > 800
