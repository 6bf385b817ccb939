"""The options a user may set, as `attach` keywords and command-line flags alike."""

from dataclasses import dataclass
from typing import Literal

from headinfer.errors import OptionError
from headinfer.units import parse_bytes, parse_tokens

DeviceName = Literal["auto", "cpu", "cuda", "simulated"]
DEVICE_NAMES: tuple[DeviceName, ...] = ("auto", "cpu", "cuda", "simulated")

TileSize = int | Literal["auto", "all"]


def _tokens(name: str, value: str | int, wanted: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return parse_tokens(value)
    except OptionError:
        raise OptionError(f"{name} must be {wanted} or 'auto', not {value!r}") from None


def _tile_size(name: str, value: str | int, wanted: str = "a positive integer") -> TileSize:
    return "all" if value == "all" else _tokens(name, value, f"{wanted}, 'all'")


def _resident_tokens(value: str | int) -> TileSize:
    if value == "0" or (isinstance(value, int) and not isinstance(value, bool) and value == 0):
        return 0
    return _tile_size("resident_tokens", value, "an integer from 0 on")


def _share(name: str, value: str | float) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if value == "off":
        return 0.0
    try:
        share = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise OptionError(f"{name} must be a share from 0 to 1, 'off' or 'auto', not {value!r}")
    return share


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Validated options of one attachment; see `Options.parse` for what each accepts.

    Attributes:
        device_memory_bytes: the most the model may use on the device; None for no limit.
        chunk_tokens: tokens that pass through the model at once in prefill.
        tile_heads: KV heads of one tile (the paper's head=8/4/2/1, section 3.2).
        tile_tokens: tokens of one tile; what bounds the device's share of the KV cache.
        device: where attention is computed and what stands between it and the host store.
        overlap: whether copies run ahead of attention; off is the synchronous twin.
        resident_tokens: the oldest tokens of each layer that are kept on the device as well.
        host_attention: share of the other tokens that the CPU attends in a decode step.
    """

    device_memory_bytes: int | None = None
    chunk_tokens: int | Literal["auto"] = "auto"
    tile_heads: TileSize = "auto"
    tile_tokens: TileSize = "auto"
    device: DeviceName = "auto"
    overlap: bool = True
    resident_tokens: TileSize = "auto"
    host_attention: float | Literal["auto"] = "auto"

    @classmethod
    def parse(
        cls,
        *,
        device_memory: str | int | None = None,
        chunk_tokens: str | int = "auto",
        tile_heads: str | int = "auto",
        tile_tokens: str | int = "auto",
        device: str = "auto",
        overlap: bool = True,
        resident_tokens: str | int = "auto",
        host_attention: str | float = "auto",
    ) -> "Options":
        """Validate options as users write them.

        Args:
            device_memory: for example "24GiB"; None or "auto" when it is not given.
            chunk_tokens: a token count, or "auto".
            tile_heads: a number of heads, "all", or "auto".
            tile_tokens: a token count, "all", or "auto".
            device: "auto", "cpu", "cuda" or "simulated".
            overlap: False fetches, waits and attends one tile at a time.
            resident_tokens: a token count, 0, "all", or "auto" for what fits.
            host_attention: a share from 0 to 1, "off", or "auto" for what was measured to be best.

        Raises:
            OptionError: a value does not parse or is out of range.
        """
        for name in DEVICE_NAMES:
            if device == name:
                break
        else:
            raise OptionError(f"device must be one of {', '.join(DEVICE_NAMES)}, not {device!r}")
        if not isinstance(overlap, bool):
            raise OptionError(f"overlap must be True or False, not {overlap!r}")
        return cls(
            device_memory_bytes=None
            if device_memory is None or device_memory == "auto"
            else parse_bytes(device_memory, "device_memory"),
            chunk_tokens=_tokens("chunk_tokens", chunk_tokens, "a positive integer"),
            tile_heads=_tile_size("tile_heads", tile_heads),
            tile_tokens=_tile_size("tile_tokens", tile_tokens),
            device=name,
            overlap=overlap,
            resident_tokens=_resident_tokens(resident_tokens),
            host_attention=_share("host_attention", host_attention),
        )
