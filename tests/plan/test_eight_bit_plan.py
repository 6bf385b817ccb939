"""Plans of tokens in 8 bits in host memory: their bytes, and that they are not exact."""

import pytest

from headinfer.plan.format import Format
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from shapes import LLAMA_3_8B


@pytest.mark.parametrize(("form", "gib"), [(Format.INT8, 66.0), (Format.FP8, 64.125)])
def test_a_million_tokens_are_counted_with_their_scales(form: Format, gib: float) -> None:
    shape = LLAMA_3_8B.stored_as(form)
    assert shape.host_kv_bytes(2**20) == gib * 2**30
    plan = resolve(shape, Options.parse(device_memory="24GiB"), device="cuda", context_tokens=2**20)
    assert (
        plan.approximation == f"keys and values in CPU memory are rounded to 8 bits ({form.value})"
    )
    assert f"approximate: {plan.approximation}" in str(plan)
    assert LLAMA_3_8B.host_format is Format.DENSE
