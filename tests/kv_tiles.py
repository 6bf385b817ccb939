"""Tiles and ledgers of tensors that a test makes."""

import torch

from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV


def tile_of(keys: torch.Tensor, values: torch.Tensor, first: int = 0, tokens: int = -1) -> Tile:
    """Return a tile of `tokens` tokens, or all, from `first` on of keys and values."""
    tokens = keys.shape[2] - first if tokens < 0 else tokens
    return Tile(0, tokens, Piece(torch.empty(0, dtype=torch.uint8)), KV(keys, values), first)
