import pytest


@pytest.fixture(autouse=True, scope="session")
def _patch_once(patch_once: None) -> None:
    """Many programs are interpreted here."""
