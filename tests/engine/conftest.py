"""What tests of caches above a disk begin with."""

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from above_disk import small_model
from slow_disk import SlowDisk


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)
