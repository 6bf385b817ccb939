"""How many Python calls a short prompt makes in each layer, where a GPU waits for Python."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "python_calls.py"
MOST_CALLS = 41
"""A layer: half of what there were once."""

MOST_CALLS_BESIDE = 40
"""What a layer adds to a new cache and its engine: less than half of what it did once."""


def test_a_layer_of_a_resident_prompt_makes_few_calls() -> None:
    script = runpy.run_path(str(SCRIPT))
    model = script["model"]()
    counter = script["count_prompt"](model, chunk_tokens=1024, resident_tokens=1024)
    calls = sum(counter.calls.values()) / model.config.num_hidden_layers
    assert 0 < calls <= MOST_CALLS, counter.calls.most_common()


def test_a_layer_adds_few_calls_beside_its_attention() -> None:
    script = runpy.run_path(str(SCRIPT))
    counter = script["count_beside"](chunk_tokens=1024, resident_tokens=1024)
    calls = sum(counter.calls.values()) / script["model"]().config.num_hidden_layers
    assert 0 < calls <= MOST_CALLS_BESIDE, counter.calls.most_common(40)
