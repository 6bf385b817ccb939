"""Low-rank adapters with random weights, saved as peft saves them."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

if importlib.util.find_spec("peft") is None:
    pytest.skip("adapters are written with peft", allow_module_level=True)

MATRICES = ["q_proj", "v_proj", "o_proj", "down_proj"]


def save_lora(model_folder: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter for a saved model, large enough to change what it says."""
    import peft  # late: that takes long, and each process of the tests collects them all

    chosen = {"r": 4, "lora_alpha": 8, "target_modules": MATRICES, "init_lora_weights": False}
    config = peft.LoraConfig(**chosen | settings)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def stock_with_lora(model_folder: Path, folder: Path, **settings: Any) -> PreTrainedModel:
    """Return the model under an adapter as peft has it, in the dtype of the model's weights."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(model_folder, **settings)
    tuned = peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return tuned.eval()
