"""Even maps of models over GPUs that are not there: what goes where, as it will be stored."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import check_device_map
from transformers import DynamicCache

import headinfer
from captured import generated
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.even_map import even_map
from headinfer.plan.even_layers import even_layers
from tiny_models import ARCHITECTURES, VOCAB, random_tokens, tiny_model

MUCH = 2**40


def config_of(name: str, **changes: Any) -> Any:
    return tiny_model(name, **changes).config


def layers_on(places: dict[str, int] | None) -> list[int]:
    assert places is not None
    return list(Counter(gpu for name, gpu in places.items() if ".layers." in name).values())


@pytest.mark.covering
@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_tensor_has_a_place_and_layers_are_even(name: str, gpus: int) -> None:
    places = even_map(config_of(name), "float32", None, [MUCH] * gpus)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    assert places is not None
    check_device_map(model, places)
    counts = layers_on(places)
    assert len(counts) == gpus
    assert max(counts) - min(counts) <= 1


def test_what_shares_weights_stays_together_and_rotary_tables_are_first() -> None:
    tied = even_map(config_of("llama3", tie_word_embeddings=True), "float32", None, [MUCH] * 3)
    assert tied is not None
    assert (tied["model.embed_tokens"], tied["lm_head"], tied["model.norm"]) == (0, 0, 2)
    apart = even_map(config_of("llama3"), "float32", None, [MUCH] * 3)
    assert apart is not None
    assert (apart["model.embed_tokens"], apart["lm_head"], apart["model.norm"]) == (0, 2, 2)
    assert apart["model.rotary_emb"] == 0


def test_a_gpu_with_less_memory_has_fewer_layers_and_too_little_is_told() -> None:
    config = config_of("llama3", num_hidden_layers=6)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    layer = sum(weight.nbytes for weight in model.model.layers[0].parameters())
    head = VOCAB * 64 * 4 + 64 * 4
    assert layers_on(even_map(config, "float32", None, [MUCH, layer, MUCH])) == [3, 1, 2]
    fits = [MUCH, layer, 2 * layer + head]
    assert layers_on(even_map(config, "float32", None, fits)) == [3, 1, 2]
    fits[2] -= 1
    assert layers_on(even_map(config, "float32", None, fits)) == [4, 1, 1]
    assert even_map(config, "float32", None, [MUCH, layer - 1, MUCH]) is None
    # In half as many bytes the same memory holds twice as many.
    assert layers_on(even_map(config, "bfloat16", None, [MUCH, layer, MUCH])) == [2, 2, 2]


def test_weights_in_4_bits_count_as_stored() -> None:
    pytest.importorskip("bitsandbytes")
    config = config_of("llama3", hidden_size=256, num_hidden_layers=6)
    four = transformers.BitsAndBytesConfig(load_in_4bit=True)
    limits = [2**20, 2**20]
    assert even_map(config, "float32", None, limits) is None
    assert layers_on(even_map(config, "float32", four, limits)) == [3, 3]
    stored = config_of("llama3", hidden_size=256, num_hidden_layers=6)
    stored.quantization_config = four.to_dict()
    assert layers_on(even_map(stored, "float32", None, limits)) == [3, 3]
    assert not hasattr(config, "quantization_config")


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("gpus", "layers"), [(2, 3), (8, 9)])
def test_a_model_that_lies_as_mapped_answers_as_the_whole_one(gpus: int, layers: int) -> None:
    model = tiny_model("llama3", num_hidden_layers=layers)
    places = even_map(model.config, "float32", None, [MUCH] * gpus)
    assert places is not None
    devices = [SimulatedDevice(seed=gpu) for gpu in range(gpus)]
    where = [devices[places[f"model.layers.{layer}"]] for layer in range(layers)]
    tokens = random_tokens(1, 45)
    expected = generated(model, tokens, DynamicCache(config=model.config))
    settings = {"device": "simulated", "chunk_tokens": 16, "tile_tokens": 8}
    with headinfer.attach(model, simulated_device=where, **settings) as offload:
        assert len(offload.plan.parts) == gpus
        found = generated(model, tokens, offload.new_cache())
    assert found.sequences.tolist() == expected.sequences.tolist()


def _best_by_trying_all(
    sizes: list[int], before: int, after: int, limits: list[int]
) -> tuple[int, ...] | None:
    def fits(counts: tuple[int, ...]) -> bool:
        held, used = iter(sizes), []
        for count in counts:
            used.append(sum(next(held) for _ in range(count)))
        used[0] += before
        used[-1] += after
        return all(size <= limit for size, limit in zip(used, limits, strict=True))

    ways = itertools.product(range(1, len(sizes) + 1), repeat=len(limits))
    fitting = [counts for counts in ways if sum(counts) == len(sizes) and fits(counts)]

    def unevenness(counts: tuple[int, ...]) -> tuple[int, list[int]]:
        return sum(count**2 for count in counts), [-count for count in counts]

    return min(fitting, key=unevenness, default=None)


@pytest.mark.parametrize("seed", range(25))
def test_the_most_even_of_what_fits_as_by_trying_all(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    sizes = [number(1, 9) for _ in range(number(1, 9))]
    before, after = number(0, 9), number(0, 9)
    limits = [number(5, 40) for _ in range(number(1, 5))]
    best = _best_by_trying_all(sizes, before, after, limits)
    assert even_layers(sizes, before, after, limits) == (None if best is None else list(best))
