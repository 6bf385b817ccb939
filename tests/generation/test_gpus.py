"""Spreading a model over GPUs while it is loaded: what accelerate is asked for, and refusals."""

import os
from collections import Counter

import pytest
import torch
from transformers import AutoConfig

import headinfer
from headinfer.errors import OptionError
from headinfer.estimate.presets import PRESETS
from headinfer.generation.gpus import Gpus
from headinfer.plan.memory import runtime_bytes
from headinfer.plan.options import Options
from saved_models import make_tokenizer
from tiny_models import VOCAB, shared_model

GIB = 2**30


@pytest.fixture
def _two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda number: ((40, 20)[number] * GIB, 80 * GIB)
    )


def gpus_of(count: object, **options: object) -> Gpus:
    gpus = Gpus.of(count, Options.parse(**options))
    assert gpus is not None
    return gpus


@pytest.mark.usefixtures("_two_gpus")
def test_weights_take_a_share_of_what_each_gpu_gives() -> None:
    config = AutoConfig.for_model(**PRESETS["llama-3-70b"])

    def shares(count: int, **options: object) -> list[float]:
        keywords = gpus_of(count, **options).keywords(config, "bfloat16")
        assert keywords["device_map"] == "auto"
        most = keywords["max_memory"]
        assert list(most) == [*range(count), "cpu"]
        assert most["cpu"] > 0
        return [(most[number] / 0.9 + runtime_bytes("cuda")) / GIB for number in range(count)]

    assert shares(1) == pytest.approx([40])
    assert shares(2) == pytest.approx([40, 20])
    assert shares(2, device_memory="24GiB") == pytest.approx([24, 20])
    assert shares(2, device_memory="30GiB,10GiB") == pytest.approx([30, 10])


@pytest.mark.usefixtures("_two_gpus")
def test_weights_in_cpu_memory_leave_what_the_kv_cache_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "headinfer.device.host_memory"
    monkeypatch.setattr(f"{module}.all_host_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(f"{module}.available_host_bytes", lambda: 60 * GIB)
    config = AutoConfig.for_model(**PRESETS["llama-3-70b"])

    def for_weights(**options: object) -> float:
        most = gpus_of(1, **options).keywords(config, "bfloat16")["max_memory"]
        return most["cpu"] / GIB

    assert for_weights() == 60
    # 1 GiB is for the process, 1 in reserve, and pages have tables.
    assert for_weights(host_memory="10GiB") == pytest.approx(58 * 4096 / (4096 + 88) - 10)
    assert for_weights(host_memory="100GiB") == 0


@pytest.mark.usefixtures("_two_gpus")
def test_layers_are_even_where_the_gpus_hold_all_weights() -> None:
    config = AutoConfig.for_model(**PRESETS["llama-3-8b"])

    def layers(count: int, **options: object) -> list[int]:
        keywords = gpus_of(count, **options).keywords(config, "bfloat16")
        assert "max_memory" not in keywords
        places = keywords["device_map"].items()
        return list(Counter(gpu for name, gpu in places if ".layers." in name).values())

    assert layers(1) == [32]
    assert layers(2) == [16, 16]
    # A layer takes 416 MiB, the output matrix 1002.
    fit = (0.9 * (8 * GIB - runtime_bytes("cuda")) / 2**20 - 1002) // 416
    assert layers(2, device_memory="20GiB,8GiB") == [32 - fit, fit]


@pytest.mark.usefixtures("_two_gpus")
def test_more_gpus_than_there_are_is_one_line() -> None:
    gpus_of(2).check("cuda")
    with pytest.raises(
        OptionError, match=r"^gpus is 3, but CUDA shows 2 GPUs here; give at most 2$"
    ):
        gpus_of(3).check("cuda")
    with pytest.raises(OptionError, match=r"^gpus is 2, but the device is 'cpu'"):
        gpus_of(2).check("cpu")


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "2"])
def test_numbers_that_cannot_be_are_refused_at_once(count: object) -> None:
    with pytest.raises(OptionError, match=f"^gpus must be a number from 1 on, not {count!r}$"):
        headinfer.generate("demo", "text", gpus=count)


def test_memory_for_another_number_of_gpus_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match=r"^device_memory has 2 values, but gpus is 3"):
        headinfer.generate("demo", "text", gpus=3, device_memory="24GiB,16GiB")


def test_a_loaded_model_stays_where_it_is() -> None:
    with pytest.raises(OptionError, match="gpus=2 is for models that are loaded here"):
        headinfer.generate(shared_model("llama3"), "text", tokenizer=make_tokenizer(VOCAB), gpus=2)


@pytest.mark.parametrize(
    ("count", "own", "set_to"), [(1, None, None), (2, None, "4x"), (8, "1x", "1x")]
)
def test_queues_of_launches_are_deep_for_several_gpus(
    monkeypatch: pytest.MonkeyPatch, count: int, own: str | None, set_to: str | None
) -> None:
    monkeypatch.setenv("CUDA_SCALE_LAUNCH_QUEUES", own or "")
    if own is None:
        monkeypatch.delenv("CUDA_SCALE_LAUNCH_QUEUES")
    gpus_of(count).prepare()
    assert os.environ.get("CUDA_SCALE_LAUNCH_QUEUES") == set_to


def test_queues_are_deep_before_cuda_is_asked_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_SCALE_LAUNCH_QUEUES", "")
    monkeypatch.delenv("CUDA_SCALE_LAUNCH_QUEUES")
    seen = []

    def is_available() -> bool:
        seen.append(os.environ.get("CUDA_SCALE_LAUNCH_QUEUES"))
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(OptionError, match="CUDA is not available"):
        next(iter(headinfer.generate("no-such-model", "x", gpus=2, device="cuda")))
    assert seen[:1] == ["4x"]
