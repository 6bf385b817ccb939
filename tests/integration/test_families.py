"""Every family of transformers: served as stock generates in every mode, or refused by name.

The slow ones take about half an hour on two cores: `pytest -m slow -k families`, for a part of them
with the name of a class, a mode or a setup beside it. They end with a count of the outcomes.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

import headinfer
from families import tiny_family
from families_expected import (
    MAY_FAIL_IN_STOCK,
    NOT_TRIED,
    REFUSED,
    REFUSED_WHEN_CALLED,
    SERVED,
    STOCK_FAILS,
    VERSION,
)
from generation_modes import MODES, Result, compare, stock
from headinfer.errors import HeadInferError, UnsupportedModelError

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < VERSION,
    reason=f"what is expected is known of transformers {VERSION[0]}.{VERSION[1]}",
)

TILES: dict[str, Any] = {"tile_heads": 1, "tile_tokens": 16, "chunk_tokens": 11}
SETUPS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", **TILES},
    "streamed": {"device": "simulated", "resident_tokens": 0, "host_attention": "off", **TILES},
    "resident": {"device": "simulated", "resident_tokens": 13, "host_attention": 0.4, **TILES},
}

SIMULATED = itertools.cycle(["streamed", "resident"])
RUNS = [(mode, setup) for mode in MODES for setup in ("cpu", next(SIMULATED))]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Counter[tuple[str, str]]]:
    """Count (mode, outcome), and print the counts at the end."""
    counts: Counter[tuple[str, str]] = Counter()
    yield counts
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    kinds = sorted({kind for _, kind in counts})
    terminal.ensure_newline()
    terminal.write_line(f"{'':16}" + "".join(f"{kind:>14}" for kind in kinds))
    for mode in dict.fromkeys(mode for mode, _ in counts):
        numbers = "".join(f"{counts[mode, kind]:>14}" for kind in kinds)
        terminal.write_line(f"{mode:16}{numbers}")


@functools.lru_cache(maxsize=1)
def model_of(name: str, mode: str) -> PreTrainedModel:
    """Return a model for one mode: some classes keep something of a call for the next."""
    return tiny_family(name)


@functools.lru_cache(maxsize=1)
def stock_result(name: str, mode: str) -> Result | Exception:
    try:
        return stock(model_of(name, mode), mode)
    except Exception as error:
        return error


def outcome_of(name: str, mode: str, setup: str) -> str:
    """Return "equal", "tie", "stock fails", or what is wrong; raise what only we fail with."""
    model, expected = model_of(name, mode), stock_result(name, mode)
    try:
        with headinfer.attach(model, **SETUPS[setup]) as offload:
            ours = MODES[mode](model, offload.new_cache)
    except Exception as error:
        if isinstance(expected, Exception) and isinstance(error, HeadInferError | type(expected)):
            return "stock fails"
        raise
    if isinstance(expected, Exception):
        return f"stock fails with {expected!r}, and ours does not"
    return compare(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "setup"), RUNS)
@pytest.mark.parametrize("name", SERVED.split())
def test_family_generates_as_stock_does(
    name: str, mode: str, setup: str, outcomes: Counter[tuple[str, str]]
) -> None:
    try:
        outcome = outcome_of(name, mode, setup)
    except HeadInferError:
        outcomes[mode, "refused"] += 1
        raise
    except Exception:
        outcomes[mode, "error"] += 1
        raise
    known = outcome in ("equal", "tie", "stock fails")
    outcomes[mode, outcome if known else "wrong"] += 1
    may_fail = mode in (*MAY_FAIL_IN_STOCK, *STOCK_FAILS.get(name, ()))
    assert outcome in ("equal", "tie", *(("stock fails",) if may_fail else ()))


REASONS = {name: reason for reason, names in REFUSED.values() for name in names.split()}
LATE_REASONS = {
    name: reason for reason, names in REFUSED_WHEN_CALLED.values() for name in names.split()
}


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=[pytest.mark.slow] if number % 6 else [])
            for number, name in enumerate(SERVED.split())
        ),
        *LATE_REASONS,
        *REASONS,
    ],
)
def test_family_is_served_or_refused_before_it_has_weights(name: str) -> None:
    model = tiny_family(name, device="meta")
    reason = REASONS.get(name, "must lie on the CPU or on CUDA devices, not on: meta")
    with pytest.raises(UnsupportedModelError, match=reason):
        headinfer.attach(model)


@pytest.mark.parametrize("name", LATE_REASONS)
def test_family_is_refused_when_called(name: str) -> None:
    model = tiny_family(name)
    with (
        headinfer.attach(model, device="cpu") as offload,
        pytest.raises(HeadInferError, match=LATE_REASONS[name]),
    ):
        MODES["greedy"](model, offload.new_cache)


@pytest.mark.parametrize("name", NOT_TRIED)
def test_family_is_not_tried_because_stock_fails(name: str) -> None:
    with pytest.raises(Exception, match=NOT_TRIED[name]):
        stock(tiny_family(name), "greedy")


def test_every_causal_class_of_transformers_is_expected_to_be_something() -> None:
    classes: set[str] = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for names in mapping.values():
            classes |= {names} if isinstance(names, str) else set(names)
    expected = [*SERVED.split(), *REASONS, *LATE_REASONS, *NOT_TRIED]
    assert classes == set(expected)
    assert len(expected) == len(classes)


def test_the_documents_name_every_reason_to_refuse() -> None:
    section = ARCHITECTURE.read_text().split("\n## What is refused\n")[1].split("\n## ")[0]
    named = [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]
    of_ranks = "KV heads that the ranks of a model cannot share evenly"  # tested with ranks
    of_disks = "a disk below the CPU as the device"  # tested with disks
    assert named == [*REFUSED, *REFUSED_WHEN_CALLED, of_disks, of_ranks, "`output_attentions`"]
