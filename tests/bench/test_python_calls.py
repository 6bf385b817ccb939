"""How many Python calls a short prompt makes in each layer, where a GPU waits for Python."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "python_calls.py"
MOST_CALLS = 43
"""A layer: half of what there were once."""


def test_a_layer_of_a_resident_prompt_makes_few_calls() -> None:
    script = runpy.run_path(str(SCRIPT))
    model = script["model"]()
    counter = script["count_prompt"](model, chunk_tokens=1024, resident_tokens=1024)
    calls = sum(counter.calls.values()) / model.config.num_hidden_layers
    assert 0 < calls <= MOST_CALLS, counter.calls.most_common()
