"""What a prompt does not do: nothing is prepared for it that only the tokens after it need."""

import pytest
import torch

import headinfer
from headinfer.integration import attention
from tiny_models import random_tokens, tiny_model


def test_a_prompt_waits_for_no_kernel_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    select = attention.select_kernels

    def noted(device: torch.device, *args: object) -> object:
        asked.append((device.type, len(seen)))
        return select(device, *args)  # type: ignore[arg-type]

    model, seen = tiny_model("llama3"), []
    monkeypatch.setattr(attention, "select_kernels", noted)
    with headinfer.attach(model, device="simulated", host_attention=0.5) as offload:
        cache = offload.new_cache()
        for tokens in (40, 1):
            model(random_tokens(1, tokens), past_key_values=cache)
            seen.append(tokens)
    of_prompt = [call for call in asked if call[1] == 0]
    layers = model.config.num_hidden_layers
    assert len(of_prompt) == layers  # those that attend the prompt
    assert len(asked) == 3 * layers  # and for a step those of the host, too
