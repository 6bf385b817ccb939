"""Partial attention on CUDA by fused kernels, which return the LSE.

For large tiles cuDNN's on Hopper and later, else flash attention, in float32 memory-efficient
attention; all are called through torch's private operators. For few rows, where reading
keys and values is the bound, Triton programs of our own (`fused_decode`), and flash attention where
there is no Triton. Each is checked on small inputs before it is trusted.
"""

import logging

import torch

from headinfer.attend.grouped import attend_grouped
from headinfer.attend.partial import Kernel, Partial, empty_partial
from headinfer.attend.prepared import PreparedKernel
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.split import FusedCall, attend_split

_logger = logging.getLogger(__name__)

_FEW_ROWS = 64
"""Up to so many folded query rows a flash kernel runs one thread block a head."""

_MIN_SPLIT_TOKENS = 256
_BLOCKS_PER_MULTIPROCESSOR = 2
_HOPPER = 9
"""Major compute capability from which cuDNN's kernels are the fastest: on an H100 they did a tile
at 690 TFLOP/s and a causal square at 620, flash attention 2 at 360 and 320."""

_CUDNN_PAIRS = 2**28
"""Query rows x keys of one head from which cuDNN is worth its preparation.

For every new shape that took 45 to 65 ms, as long as it then saves 32 layers of 8 heads with so
many pairs in a tile; twice that in a causal square, whose shapes come again from prompt to prompt.
"""


class CudaKernel(Kernel):
    """A fused CUDA kernel for tiles and causal squares; masked calls go to the reference kernel.

    Args:
        name: what to call it.
        tile: its operator for tiles.
        few: the operator for tiles of few query rows, in splits, and of a single key.
        square: the operator with a causal mask.
        torch_device: which GPU.
    """

    def __init__(
        self,
        name: str,
        *,
        tile: FusedCall,
        few: FusedCall,
        square: FusedCall,
        torch_device: torch.device,
    ) -> None:
        self.name = name
        self._tile = tile
        self._few = few
        self._square = square
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
                lambda q, k, v, _row: self._square(q, k, v, scale), query, keys, values
            )
        folded = query.reshape(batch, kv_heads, group * q_len, -1)
        rows, kv_len = folded.shape[2], keys.shape[2]
        splits = min(self._blocks // (batch * kv_heads), kv_len // _MIN_SPLIT_TOKENS)
        if rows <= _FEW_ROWS and batch == 1 and splits > 1:
            out, lse = attend_split(self._few, folded, keys, values, scale, splits)
        elif rows <= _FEW_ROWS or kv_len == 1:
            out, lse = self._few(folded, keys, values, scale)
        else:
            out, lse = self._tile(folded, keys, values, scale)
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


def _cudnn(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    /,
    *,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(query.shape[:3])


def _cudnn_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, /
) -> tuple[torch.Tensor, torch.Tensor]:
    return _cudnn(query, keys, values, scale, causal=True)


def candidates(torch_device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """Return the fused kernels that may serve this dtype and head_dim, best first."""
    half = dtype in (torch.float16, torch.bfloat16)
    if head_dim % 8 or not (half or dtype == torch.float32):
        return []
    fused: list[Kernel] = []
    if half and head_dim <= 256:
        flash = CudaKernel(
            "torch flash attention (CUDA)",
            tile=_flash,
            few=_flash,
            square=_flash_causal,
            torch_device=torch_device,
        )
        hopper = torch.cuda.get_device_capability(torch_device)[0] >= _HOPPER
        if hopper and head_dim <= 128:
            cudnn = CudaKernel(
                "cuDNN attention",
                tile=_cudnn,
                few=_flash,  # cuDNN takes no single key
                square=_cudnn_causal,
                torch_device=torch_device,
            )
            fused.append(PreparedKernel(cudnn, flash, least_pairs=_CUDNN_PAIRS))
        else:
            fused.append(flash)
    fused.append(
        CudaKernel(
            "memory-efficient attention (CUDA)",
            tile=_efficient,
            few=_efficient,
            square=_efficient_causal,
            torch_device=torch_device,
        )
    )
    return [*_with_fused_decode(fused, torch_device, dtype, head_dim), *fused]


def _with_fused_decode(
    others: list[Kernel], torch_device: torch.device, dtype: torch.dtype, head_dim: int
) -> list[Kernel]:
    """Return each kernel with few rows served by Triton; none where there is no Triton."""
    try:
        from headinfer.attend.fused_decode import FusedDecodeKernel, serves
    except Exception as error:  # it is not there, or is broken: torch's kernels serve
        _logger.info("no Triton: %s", error)
        return []
    if not serves(dtype, head_dim):
        return []
    multiprocessors = torch.cuda.get_device_properties(torch_device).multi_processor_count
    return [FusedDecodeKernel(other, multiprocessors) for other in others]
