"""Memory of layers viewed at once, and keys and values of a layer as one tensor."""

import itertools

import torch

from headinfer.device.simulated import SimulatedDevice
from headinfer.kv.pair import KV, Geometry
from headinfer.kv.place import Arena
from headinfer.plan.memory import ALIGNMENT_BYTES, aligned


def test_layers_alike_get_what_each_would_by_itself() -> None:
    geometry, tokens, number = Geometry(2, 3, 5, 7, torch.float32), 11, 4
    num_bytes = geometry.num_bytes(tokens)
    assert num_bytes % ALIGNMENT_BYTES
    arena_bytes = number * aligned(num_bytes) + ALIGNMENT_BYTES
    memory = Arena(SimulatedDevice(), arena_bytes).take_alike(num_bytes, number)
    keys, values = (part.unbind() for part in geometry.carve(memory, tokens))
    for piece, *whole in zip(memory.unbind(), keys, values, strict=True):
        alone = geometry.carve(piece, tokens)
        for part, wanted in zip(whole, alone, strict=True):
            assert part.shape == wanted.shape
            assert part.stride() == wanted.stride()
            assert part.data_ptr() == wanted.data_ptr()
    starts = [piece.data_ptr() for piece in memory]
    assert {after - before for before, after in itertools.pairwise(starts)} == {aligned(num_bytes)}
    assert not starts[0] % ALIGNMENT_BYTES


def test_keys_and_values_of_one_dim_are_one_tensor() -> None:
    geometry = Geometry(2, 3, 5, 5, torch.float32)
    buffer = torch.zeros(64 + geometry.num_bytes(11), dtype=torch.uint8)[64:]
    whole = geometry.carve(buffer, 11)
    new = KV(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5))
    joint = geometry.joint(whole, 6, 4)
    assert joint is not None
    torch.cat(new, out=joint)
    for part, wanted in zip(whole, new, strict=True):
        assert torch.equal(part[:, :, 6:10], wanted)
        assert not part[:, :, :6].any()
        assert not part[:, :, 10:].any()
    assert Geometry(2, 3, 5, 7, torch.float32).joint(whole, 6, 4) is None
