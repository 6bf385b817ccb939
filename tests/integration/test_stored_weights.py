"""The bytes that weights take, in the forms that libraries store them in."""

import torch
from torch.testing._internal.two_tensor import TwoTensor

from headinfer.integration.stored_weights import weights_bytes
from tiny_models import tiny_model


def test_shared_memory_counts_once_and_buffers_count() -> None:
    module = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    module.tied = module.weight
    module.register_buffer("same", module.weight.data.view(-1))
    module.register_buffer("scale", torch.zeros(3))
    assert weights_bytes(module) == 8 * 8 * 2 + 3 * 4


def test_a_tensor_made_of_tensors_takes_what_these_take() -> None:
    module = torch.nn.Module()
    both = TwoTensor(torch.zeros(16, 4), torch.zeros(16, 4))
    module.weight = torch.nn.Parameter(both, requires_grad=False)
    assert weights_bytes(module) == 2 * 16 * 4 * 4


def test_weights_without_memory_count_as_if_they_had_it() -> None:
    with torch.device("meta"):
        empty = tiny_model("llama3")
    assert weights_bytes(empty) == weights_bytes(tiny_model("llama3"))
