"""Which families have their decode steps captured: all that are served, but a list with reasons.

The whole list takes one or two minutes: `pytest -m slow -k capture_families`.
"""

import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import headinfer
from captured import SIMULATED, few, generated, launched
from families import tiny_family
from families_expected import SERVED, VERSION
from generation_modes import text
from headinfer.device.simulated import SimulatedDevice

pytestmark = pytest.mark.skipif(
    tuple(int(part) for part in transformers.__version__.split(".")[:2]) < VERSION,
    reason=f"what is expected is known of transformers {VERSION[0]}.{VERSION[1]}",
)

# (why not, what the log says, who)
NOT_CAPTURED: list[tuple[str, str, str]] = [
    (
        "layers with states of transformers' own",
        "while layers keep states of transformers' own",
        """
        BambaForCausalLM GraniteMoeHybridForCausalLM JambaForCausalLM LaraMiniForCausalLM
        Lfm2MoeForCausalLM Lfm3ForCausalLM Lfm3VlForConditionalGeneration
        MiniCPMOcrForConditionalGeneration MiniCPMV4_6ForConditionalGeneration
        MiniCPMV4_7ForConditionalGeneration
        NemotronHForCausalLM OlmoHybridForCausalLM Qwen3NextForCausalLM Qwen3_5ForCausalLM
        Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
        """,
    ),
    (
        "experts or adapters that are chosen on the host",
        "it reads back what",
        "DbrxForCausalLM Step3p7ForConditionalGeneration XmodForCausalLM",
    ),
    ("a mask of the model's own, that is looked at", "it reads back what", "BioGptForCausalLM"),
    (
        "positions for each row, which begin elsewhere than at 0",
        "is invalid for input of size",
        "Kosmos2_5ForConditionalGeneration",
    ),
    (
        "positions that are counted in Python, whatever is passed",
        "captured, they give other bits",
        """
        EvollaForProteinText2Text MossTranscribeDiarizeForConditionalGeneration
        VibeVoiceAsrForConditionalGeneration
        """,
    ),
]
REASONS = {name: said for _, said, names in NOT_CAPTURED for name in names.split()}
ON_THE_CPU = {"GPT2LMHeadModel": "it reads back what"}
"""Those that are captured elsewhere: they look for padding where they see no GPU that captures."""

FEW = """
BioGptForCausalLM DbrxForCausalLM EvollaForProteinText2Text GPT2LMHeadModel
Kosmos2_5ForConditionalGeneration Lfm2MoeForCausalLM Qwen2_5_VLForConditionalGeneration
"""
"""One of each kind; the architectures of `tiny_models` have tests of their own."""

NEW_TOKENS = 12


class Capturing(SimulatedDevice):
    """A device on which transformers sees that a step is being captured, as it does on a GPU."""

    def capture(self, work: Callable[[], Any]) -> Any:
        with mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            return super().capture(work)


@pytest.mark.covering(most=5)
@pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param(name, device, marks=() if name in few_names else pytest.mark.slow)
        for device, few_names in (("simulated", FEW.split()), ("cpu", ON_THE_CPU))
        for name in SERVED.split()
    ],
)
def test_steps_are_captured_or_not_as_listed(
    name: str, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "headinfer")
    model, logits, options = tiny_family(name), [], {"device": device}
    reasons = REASONS | (ON_THE_CPU if device == "cpu" else {})
    if device == "simulated":
        options = {**SIMULATED, "simulated_device": Capturing()}
    for capture in (False, True):
        with headinfer.attach(model, **options, capture=capture) as offload:
            output = generated(
                *(model, text(2, 30), offload.new_cache()),
                **{"max_new_tokens": NEW_TOKENS, "suppress_tokens": [0, 1, 2]},
                **{"eos_token_id": None, "pad_token_id": 0},
            )
            logits.append(torch.stack(output.logits))
            stats = offload.stats
    assert torch.equal(*logits)
    assert stats.decode_steps == NEW_TOKENS - 1
    said = [each for each in caplog.messages if "launched kernel by kernel" in each]
    if name in reasons:
        assert stats.captured_steps == 0
        assert [reasons[name] in each for each in said] == [True]
    else:
        assert (stats.captures, launched(stats), said) == (1, few(30, NEW_TOKENS - 1), [])


def test_the_list_names_families_that_are_served() -> None:
    assert set(REASONS) | set(FEW.split()) <= set(SERVED.split())
