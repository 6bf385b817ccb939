"""The demo model, built once for all tests of this folder."""

from pathlib import Path

import pytest

from headinfer.demo import build_model


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of tests that take minutes."""
    config.addinivalue_line("markers", "slow: takes minutes; not run by default")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a freshly built demo model."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    build_model(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo_folder):
    """The demo's tokenizer, as users load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="session")
def model(demo_folder):
    """The demo model under stock sdpa attention, as users load it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo_folder, attn_implementation="sdpa").eval()
