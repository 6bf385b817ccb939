"""What the demos have in common: devices, tiles that are plain to see, and excerpts."""

from dataclasses import replace

from headinfer.generation.model import choose_device
from headinfer.plan.options import Options

_MIN_TOKENS_AT_ONCE, _MAX_TOKENS_AT_ONCE = 512, 4096
"""Chunk and tile of the demo on devices with memory of their own: a sixteenth of the document
within these bounds. So the GPU memory's share of the cache is plain to see."""

_EXCERPT_CHARACTERS = 420


def choose_demo_device(options: Options) -> str:
    """Return CUDA if there is one, else the simulated device: it bounds its memory as CUDA does."""
    chosen = choose_device(options.device)
    return "simulated" if options.device == "auto" and chosen == "cpu" else chosen


def with_small_tiles(options: Options, num_tokens: int) -> Options:
    """Set chunk and tile where the user left them, and the device's memory, open."""
    if options.device_memory_bytes is not None:
        return options
    at_once = min(max(num_tokens // 16, _MIN_TOKENS_AT_ONCE), _MAX_TOKENS_AT_ONCE)
    return replace(
        options,
        chunk_tokens=at_once if options.chunk_tokens == "auto" else options.chunk_tokens,
        tile_tokens=at_once if options.tile_tokens == "auto" else options.tile_tokens,
        resident_tokens=0,
    )


def shared_tokens(prompts: list[list[int]]) -> int:
    """Return how many tokens are the same at the beginning of all prompts."""
    shared = 0
    for token_ids in zip(*prompts, strict=False):
        if len(set(token_ids)) > 1:
            break
        shared += 1
    return shared


def excerpt(text: str, needle: str) -> str:
    """Return the surroundings of a word, on one line, with dots where they were cut off."""
    middle = text.index(needle)
    start = max(middle - _EXCERPT_CHARACTERS // 2, 0)
    end = min(middle + _EXCERPT_CHARACTERS // 2, len(text))
    if start:
        start = text.index(" ", start) + 1
    if end < len(text):
        end = text.rindex(" ", start, end)
    words = " ".join(text[start:end].split())
    return f"{'... ' if start else ''}{words}{' ...' if end < len(text) else ''}"
