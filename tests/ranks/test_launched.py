"""What torchrun says, which models can be split, and where GPUs hang."""

import pytest
import transformers

from headinfer.errors import OptionError, RanksError, UnsupportedModelError
from headinfer.generation.split import check_splittable
from headinfer.ranks.group import ALONE, fingerprint
from headinfer.ranks.launched import Launched
from headinfer.ranks.near import cores_near
from tiny_models import random_tokens

PLACE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_a_place_is_read_from_what_torchrun_sets() -> None:
    assert Launched.of(PLACE) == Launched(rank=3, local_rank=1, size=4, on_host=2)
    assert Launched.of({"RANK": "3", "WORLD_SIZE": "4"}) is None
    with pytest.raises(RanksError, match="LOCAL_RANK='x'"):
        Launched.of(PLACE | {"LOCAL_RANK": "x"})


@pytest.mark.parametrize(("size", "said"), [(None, "a process for each rank"), ("1", "started 1")])
def test_a_process_that_is_no_rank_is_refused(monkeypatch, size, said) -> None:
    for name, value in (PLACE | {"WORLD_SIZE": size}).items() if size else ():
        monkeypatch.setenv(name, value)
    with pytest.raises(RanksError, match=said):
        Launched.wanted()


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(OptionError, match="this host has 2 ranks and 1 GPU; start"):
        Launched.of(PLACE).join("cuda")


def test_models_that_are_not_split_are_refused_by_their_config() -> None:
    check_splittable("a", transformers.LlamaConfig(num_key_value_heads=8), 4)
    check_splittable("b", transformers.Phi3Config(num_key_value_heads=2), 4)  # not by heads
    with pytest.raises(UnsupportedModelError, match="8 KV heads in a layer, which 3 ranks"):
        check_splittable("c", transformers.LlamaConfig(num_key_value_heads=8), 3)
    with pytest.raises(UnsupportedModelError, match="has no tp_plan"):
        check_splittable("d", transformers.GPT2Config(), 2)


def test_calls_with_other_tokens_have_other_fingerprints() -> None:
    tokens = random_tokens(2, 9)
    told = {
        fingerprint(tokens, 1),
        fingerprint(tokens, 2),
        fingerprint(tokens.flip(1), 1),
        fingerprint(tokens.flip(0), 1),
        fingerprint(None, 1),
    }
    assert len(told) == 5
    assert fingerprint(tokens.clone(), 1) in told


def test_a_model_in_one_process_agrees_with_itself() -> None:
    assert ALONE.least(3, -1) == (3, -1)
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.together(lambda: 5) == 5


@pytest.mark.parametrize(
    ("nodes", "of_gpu", "cores"),
    [(2, "1", {2, 3, 7}), (2, "0", {0, 1}), (1, "0", set()), (2, "-1", set()), (2, None, set())],
)
def test_cores_near_a_gpu(tmp_path, nodes, of_gpu, cores) -> None:
    for node, listed in enumerate(["0-1\n", "2-3,7\n"][:nodes]):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(listed)
    gpu = tmp_path / "bus/pci/devices/0000:ab:00.0"
    gpu.mkdir(parents=True)
    if of_gpu is not None:
        (gpu / "numa_node").write_text(f"{of_gpu}\n")
    assert cores_near("0000:AB:00.0", tmp_path) == cores
