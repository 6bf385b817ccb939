"""Web pages of other origins: which may call the server, and what browsers are told."""

import httpx2
import pytest
from scripted import ScriptedDesk, serving
from server_parts import running
from typer.testing import CliRunner

from headinfer.cli.main import app
from headinfer.server.origins import check_origins
from saved_models import save_llama

PAGE = "https://page.example"
CHAT = "/v1/chat/completions"
ASKED = {"Access-Control-Request-Method": "POST"}
WANTED = ASKED | {"Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang"}
ALLOWED = "access-control-allow-origin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("open"), chat=True, eos_token_id=None)


@pytest.fixture(scope="module")
def server(folder):
    """A server that two other origins may call, with a key."""
    origins = ("--cors-origin", PAGE, "--cors-origin", "http://LOCALHOST:3000")
    with running("--model", folder, *origins, key="secret") as server:
        yield server


@pytest.mark.parametrize("origin", [PAGE, "http://localhost:3000"])
def test_a_page_may_ask_and_read_the_answer(server, origin: str) -> None:
    before = httpx2.options(server.url + CHAT, headers=WANTED | {"Origin": origin})
    assert before.status_code == 200
    assert before.headers[ALLOWED] == origin
    assert "POST" in before.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in before.headers["access-control-allow-headers"]
    body = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
    for key, status in (("secret", 200), ("wrong", 401)):  # what is refused can be read, too
        headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
        answer = httpx2.post(server.url + CHAT, json=body, headers=headers, timeout=180)
        assert answer.status_code == status
        assert answer.headers[ALLOWED] == origin
        assert "access-control-allow-credentials" not in answer.headers


def test_a_page_of_the_internet_may_ask_a_server_of_the_own_machine(server) -> None:
    private = {"Origin": PAGE, "Access-Control-Request-Private-Network": "true"}
    assert httpx2.options(server.url + CHAT, headers=WANTED | private).status_code == 200


def test_other_pages_are_told_nothing(server) -> None:
    for origin in ("https://other.example", "http://page.example", "null"):
        before = httpx2.options(server.url + CHAT, headers=WANTED | {"Origin": origin})
        assert before.status_code == 400
        headers = {"Origin": origin, "Authorization": "Bearer secret"}
        answer = httpx2.get(server.url + "/v1/models", headers=headers)
        assert answer.status_code == 403
        assert ALLOWED not in before.headers
        assert ALLOWED not in answer.headers


def test_no_page_may_ask_unless_the_server_says_so() -> None:
    body = {"messages": [{"role": "user", "content": "w1"}]}
    with serving(ScriptedDesk(["w3"])) as (url, _):
        answer = httpx2.post(url + CHAT, json=body, headers={"Origin": PAGE})
        own = httpx2.post(url + CHAT, json=body, headers={"Origin": url})
        none = httpx2.post(url + CHAT, json=body)
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error["type"] == "permission_error"
    assert PAGE in error["message"]
    assert "--cors-origin" in error["message"]
    assert ALLOWED not in answer.headers
    assert (own.status_code, none.status_code) == (200, 200)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost"}, 200),
        ({"Host": "LOCALHOST:9000", "Origin": "http://localhost:9000"}, 200),  # a forwarded port
        ({"Host": "127.0.0.2:1"}, 200),
        ({"Host": "[::1]:9000"}, 200),
        ({"Host": "page.example", "Origin": PAGE}, 200),  # by a proxy
        ({"Host": "localhost:9000", "Origin": "http://localhost:9001"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),  # rebound
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1]evil.example"}, 403),
        ({"Host": "[2001:db8::1]"}, 403),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(value.values()),
)
def test_a_server_of_the_own_machine_is_called_by_no_other_name(
    server, headers: dict[str, str], status: int
) -> None:
    key = {"Authorization": "Bearer secret"}
    answer = httpx2.get(server.url + "/v1/models", headers=headers | key)
    assert answer.status_code == status
    if status == 403:
        assert headers.get("Origin", headers["Host"]).lower().split("//")[-1] in answer.text


@pytest.mark.slow
def test_a_server_that_other_machines_reach_has_any_name(folder) -> None:
    with running("--model", folder, "--host", "0.0.0.0") as server:
        url = server.url + "/v1/models"
        named = {"Host": "box.example:8000"}
        own = httpx2.get(url, headers=named | {"Origin": "http://box.example:8000"})
        other = httpx2.get(url, headers=named | {"Origin": PAGE})
    assert (own.status_code, other.status_code) == (200, 403)


@pytest.mark.slow
def test_all_pages_may_ask_and_a_warning_says_so(folder) -> None:
    with running("--model", folder, "--cors-origin", "*") as server:
        answer = httpx2.get(f"{server.url}/v1/models", headers={"Origin": PAGE})
        named = httpx2.get(f"{server.url}/v1/models", headers={"Host": "page.example"})
        _, err = server.end()
    assert named.status_code == 200
    assert answer.headers[ALLOWED] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert "every web page" in err


def test_the_pages_of_programs_can_be_named() -> None:
    given = ("chrome-extension://abc", "tauri://localhost", "app://obsidian.md")
    assert check_origins(given) == given


@pytest.mark.parametrize(
    "given", ["page.example", "https://page.example/", "https://page.example/a", "https://", "null"]
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    done = CliRunner().invoke(app, ["serve", "--cors-origin", given])
    assert done.exit_code == 2
    assert given in done.stderr
    assert "http://localhost:3000" in done.stderr.replace("\n", " ")
