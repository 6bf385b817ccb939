import pytest

pytest.importorskip("fastapi")

from openai import OpenAI
from server_parts import WAIT_S, running

from saved_models import save_llama


@pytest.fixture(scope="session")
def server():
    """A server of the embedded model."""
    with running("--ping", 0.2, "--max-body", "2MiB", "--max-new-tokens", 2000) as server:
        yield server


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A server of a tiny model that never comes to an end, for one request at a time."""
    folder = save_llama(
        tmp_path_factory.mktemp("endless"), chat=True, eos_token_id=None, positions=2**20
    )
    options = ("--parallel", 1, "--queue", 1, "--alias", "endless", "--ping", 0.2)
    with running("--model", folder, *options, key="secret") as server:
        yield server


@pytest.fixture(scope="session")
def client(server):
    """The official client of the embedded model's server."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="session")
def endless_client(endless):
    """The official client of the tiny model's server."""
    return OpenAI(base_url=f"{endless.url}/v1", api_key="secret", max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="session")
def generate():
    """What `headinfer generate` writes to stdout."""
    from typer.testing import CliRunner

    from headinfer.cli.main import app

    def run(*args: object) -> str:
        done = CliRunner().invoke(app, ["generate", "--device", "cpu", *map(str, args)])
        assert done.exit_code == 0, done.stderr
        return done.stdout.removesuffix("\n")

    return run
