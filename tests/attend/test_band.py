"""Attention within a window without masks, where a GPU has it."""

import pytest
import torch

from attended import exact_band
from headinfer.attend.band import find_band
from headinfer.kv.pair import KV


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_no_such_kernel(dtype: torch.dtype) -> None:
    assert find_band(torch.device("cpu"), dtype, 64) is None


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [32, 80, 128, 256])
@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len", "window"),
    [(1, 5, 5, 2), (2, 130, 300, 77), (1, 1000, 1255, 256), (1, 33, 64, 100)],
)
def test_it_sees_what_masks_show(
    dtype: torch.dtype,
    dim: int,
    batch: int,
    q_len: int,
    kv_len: int,
    window: int,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, 2, 3, q_len, dim, dtype=dtype, device="cuda")
    wide = torch.randn(2, batch, 4, kv_len, dim, dtype=dtype, device="cuda")
    kv = KV(*wide[:, :, 1:3])  # heads at the distances of a cache
    band = find_band(query.device, dtype, dim, softcap)
    assert band is not None
    ours = band(query, kv, 0.1, window)
    wanted = exact_band(query, kv, 0.1, window, softcap)
    torch.testing.assert_close(ours.out.double(), wanted.out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(ours.lse.double(), wanted.lse, rtol=1e-3, atol=1e-3)
