"""Which launches share a compiled variant of a Triton program."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)
from headinfer.native import triton_launch
from headinfer.native.triton_launch import Program


class Variant:
    """Stands for a compiled program, and notes what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, *arguments))


class Jitted:
    """Stands for a jitted program, which is compiled anew by each launch it gets."""

    def __init__(self) -> None:
        self.variants: list[Variant] = []

    def __getitem__(self, _grid):
        def launch(*_arguments, num_warps):
            assert num_warps == 4
            self.variants.append(Variant())
            return self.variants[-1]

        return launch


MEMORY = torch.zeros(64)
ALIGNED = MEMORY[-MEMORY.data_ptr() // 4 % 4 :]
GIVEN = ((1, 1, 1), (ALIGNED,), (7, 0.5), (32, 3), (16, True))


@pytest.fixture
def jitted(monkeypatch: pytest.MonkeyPatch) -> Jitted:
    monkeypatch.setattr(triton_launch, "CompiledKernel", Variant)
    return Jitted()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((0, (9, 2, 1)), (2, (8, 1.5)), (3, (48, 5)), (3, (0, 3))),
        (1, (ALIGNED[4:],)),
    ],
    ids=["grid", "numbers", "strides", "no stride", "pointer"],
)
def test_what_a_program_is_not_compiled_for_shares_a_variant(jitted, place, value) -> None:
    program = Program(jitted, num_warps=4)
    program.launch(*GIVEN)
    other = [*GIVEN[:place], value, *GIVEN[place + 1 :]]
    program.launch(*other)
    (variant,) = jitted.variants
    ((grid, tensor, *rest),) = variant.launches
    assert grid == other[0]
    assert tensor is other[1][0]
    assert rest == [*other[2], *other[3], *other[4]]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((3, (33, 3)), (3, (32, 1)), (3, (2**31, 3)), (3, (1, 3))),
        *((4, (16, False)), (4, (32, True))),
        *((1, (ALIGNED[1:],)), (1, (ALIGNED.half(),)), (1, (torch.zeros(1, device="meta"),))),
    ],
    ids=["odd", "one", "large", "one for even", "flag", "size", "address", "dtype", "device"],
)
def test_what_a_program_is_compiled_for_has_a_variant_each(jitted, place, value) -> None:
    program = Program(jitted, num_warps=4)
    program.launch(*GIVEN)
    program.launch(*GIVEN[:place], value, *GIVEN[place + 1 :])
    assert len(jitted.variants) == 2
    program.launch(*GIVEN)
    assert [len(variant.launches) for variant in jitted.variants] == [1, 0]
