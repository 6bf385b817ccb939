"""Names of models that are mistyped, and a hub that cannot be reached."""

import time

import pytest


class _AtOnce:
    """A timer that does not wait."""

    def __init__(self, _seconds, function, args) -> None:
        self._run = lambda: function(*args)
        self.daemon = False

    def start(self) -> None:
        self._run()

    def cancel(self) -> None:
        """Do nothing: it is over."""


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("generate", "-p", "x", "-m", "smolm2"), "smollm2"),
        (("chat", "-m", "dmeo"), "demo"),
        (("serve", "-m", "gemma3-270"), "gemma3-270m"),
        (("plan", "--model", "llama-3-70"), "llama-3-70b"),
        (("roofline", "--model", "lama-3-8b"), "llama-3-8b"),
    ],
)
def test_a_name_that_is_mistyped_is_told_with_the_one_that_is_meant(cli, args, meant):
    done = cli(*args)
    assert done.code == 2
    assert done.error_lines[-1].endswith(f"; did you mean {meant!r}?")
    assert len(done.error_lines) == 1


def test_a_name_like_none_of_ours_has_no_hint(cli):
    done = cli("generate", "-p", "x", "-m", "Qwen/Qwen9-8B")
    assert done.code == 2
    assert "did you mean" not in done.err


def test_a_hub_that_cannot_be_reached_is_not_waited_for(cli, monkeypatch):
    from huggingface_hub import constants

    slept_s = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nobody = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nobody)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", slept_s.append)
    done = cli("generate", "-p", "x", "-m", "smolm2")
    assert done.code == 2
    assert "the model hub cannot be reached; did you mean 'smollm2'?" in done.error_lines[-1]
    assert sum(slept_s) <= 1


def test_a_server_tells_that_it_asks_the_hub(cli, monkeypatch):
    monkeypatch.setattr("threading.Timer", _AtOnce)
    assert "fetching smolm2 from the model hub" in cli("serve", "-m", "smolm2").err
