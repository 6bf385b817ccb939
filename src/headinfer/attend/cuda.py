"""Partial attention on CUDA by torch's fused kernels, which return the LSE.

Flash attention for 16-bit types, memory-efficient attention for float32; both are called through
private operators, so `select` runs them once on small inputs before trusting them.
"""

import torch

from headinfer.attend.grouped import attend_grouped
from headinfer.attend.partial import Kernel, Partial, empty_partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.split import FusedCall, attend_split

_FEW_ROWS = 64
"""Up to so many folded query rows a flash kernel runs one thread block a head."""

_MIN_SPLIT_TOKENS = 256
_BLOCKS_PER_MULTIPROCESSOR = 2


class CudaKernel:
    """A fused CUDA kernel for tiles and causal squares; masked calls go to the reference kernel."""

    def __init__(self, name: str, *, flash: bool, torch_device: torch.device) -> None:
        self.name = name
        self._call: FusedCall = _flash if flash else _efficient
        self._causal: FusedCall = _flash_causal if flash else _efficient_causal
        self._masked = ReferenceKernel()
        properties = torch.cuda.get_device_properties(torch_device)
        self._blocks = _BLOCKS_PER_MULTIPROCESSOR * properties.multi_processor_count

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend in one fused call where there is no mask; see `Kernel.attend`."""
        batch, kv_heads, group, q_len, _ = query.shape
        if q_len == 0 or keys.shape[2] == 0:
            return empty_partial(query, values.shape[3])
        if mask is not None:
            return self._masked.attend(query, keys, values, scale=scale, mask=mask)
        if causal and q_len > 1:
            return attend_grouped(
                lambda q, k, v, _row: self._causal(q, k, v, scale), query, keys, values
            )
        folded = query.reshape(batch, kv_heads, group * q_len, -1)
        splits = min(self._blocks // (batch * kv_heads), keys.shape[2] // _MIN_SPLIT_TOKENS)
        if batch == 1 and splits > 1 and folded.shape[2] <= _FEW_ROWS:
            out, lse = attend_split(self._call, folded, keys, values, scale, splits)
        else:
            out, lse = self._call(folded, keys, values, scale)
        return Partial(*(torch.unflatten(part, 2, (group, q_len)) for part in (out, lse)))


def _flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    /,
    *,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, keys, values, 0.0, causal, False, scale=scale
    )
    return out, lse[:, :, : query.shape[2]]


def _flash_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, /
) -> tuple[torch.Tensor, torch.Tensor]:
    return _flash(query, keys, values, scale, causal=True)


def _efficient(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    /,
    *,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, None, True, 0.0, causal, scale=scale
    )
    # This kernel pads the LSE of each head to a multiple of 32 rows.
    return out, lse[:, :, : query.shape[2]]


def _efficient_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, /
) -> tuple[torch.Tensor, torch.Tensor]:
    return _efficient(query, keys, values, scale, causal=True)


def candidates(torch_device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """Return the fused kernels that may serve this dtype and head_dim, best first."""
    fused: list[Kernel] = []
    if dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 8 == 0:
        fused.append(
            CudaKernel("torch flash attention (CUDA)", flash=True, torch_device=torch_device)
        )
    if dtype in (torch.float16, torch.bfloat16, torch.float32) and head_dim % 8 == 0:
        fused.append(
            CudaKernel("memory-efficient attention (CUDA)", flash=False, torch_device=torch_device)
        )
    return fused
