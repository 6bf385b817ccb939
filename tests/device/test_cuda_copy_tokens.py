"""Tokens of a layer copied between the host and a GPU: keys and values in one transfer."""

import pytest
import torch

from headinfer.device.cuda import CudaDevice
from headinfer.kv.pair import KV, Geometry

pytestmark = pytest.mark.gpu


def filled(memory: torch.Tensor, geometry: Geometry, tokens: int, start: int) -> KV:
    """Return keys and values in some memory, all of them different."""
    whole = geometry.carve(memory, tokens)
    for part in whole:
        values = torch.arange(start, start + part.numel(), dtype=torch.int32)
        part.copy_((values % 251).view(part.shape))
        start += part.numel() + 1
    return whole


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 8), (3, 2)])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (64, 32)])
@pytest.mark.parametrize("home", [True, False])
def test_tokens_of_both_parts_come_to_their_places(
    batch: int, heads: int, key_dim: int, value_dim: int, home: bool
) -> None:
    device = CudaDevice(torch.device("cuda"))
    geometry = Geometry(batch, heads, key_dim, value_dim, torch.bfloat16)
    capacity, other_capacity, at, first, tokens = 70, 43, 9, 5, 31
    host = filled(device.host_empty(geometry.num_bytes(capacity)), geometry, capacity, 0)
    there = filled(
        device.device_empty(geometry.num_bytes(other_capacity)), geometry, other_capacity, 7
    )
    to, start = (host, there) if home else (there, host)
    wanted = [part.cpu().clone() for part in to]
    for part, source in zip(wanted, start, strict=True):
        part[:, :, at : at + tokens] = source[:, :, first : first + tokens].cpu()
    device.synchronize()
    device.copy_out.copy_tokens(to, at, start, first, tokens)
    device.synchronize()
    for part, right in zip(to, wanted, strict=True):
        assert torch.equal(part.cpu(), right)
