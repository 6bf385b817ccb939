"""Files of head patterns: our own, and those of the projects that people have them from.

`read_pattern` tells a file's format by its name and content. Files are not trusted: tensors are
loaded without running code, and what is malformed is refused in one line.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.heads.pattern import HeadPattern, shape_text
from headinfer.scratch import scratch_folder
from headinfer.units import counted

FORMAT = "headinfer-heads-1"
"""Value of `format` in our own files."""

_SCORES, _CONFIG = "full_attention_heads.tsv", "config.json"
_QUERY_HEAD = re.compile(r"(\d{1,4})-(\d{1,4})")

Scores = tuple[tuple[float, ...], ...]


def read_pattern(path: str | Path, kv_heads: Sequence[int] | None = None) -> HeadPattern:
    """Return the pattern that a file or folder holds.

    Args:
        path: of our own JSON, or of a folder of DuoAttention with its TSV and config. A tensor of
            KVzip (`.pt`) and Wu et al.'s JSON of retrieval scores of query heads are read, too.
        kv_heads: KV heads of each of the model's decoder layers, which the pattern is checked
            against. Retrieval scores need them where query heads share a KV head: the highest score
            of such a group is that of its KV head.

    Raises:
        OptionError: it cannot be read, has none of these forms, or does not fit `kv_heads`.
    """
    place = Path(path).expanduser()
    try:
        pattern = _read(place, kv_heads)
        if kv_heads is not None:
            pattern.check(kv_heads)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from error
    except OptionError as error:
        raise _refusal(path, str(error)) from error
    return pattern


def write_pattern(path: str | Path, pattern: HeadPattern) -> None:
    """Write a pattern in our own format, in place of any file of that name.

    Raises:
        OptionError: it cannot be written.
    """
    place = Path(path)
    rows = ",\n".join(
        f"  {json.dumps([float(f'{score:.9g}') for score in row])}" for row in pattern.scores
    )
    head = {
        "format": FORMAT,
        "model": pattern.model,
        "kv_heads": list(pattern.kv_heads),
        "sink_tokens": pattern.sink_tokens,
        "recent_tokens": pattern.recent_tokens,
        "made": pattern.made,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    text = "{\n" + ",\n".join([*lines, f' "scores": [\n{rows}\n ]']) + "\n}\n"
    try:
        with scratch_folder(place.parent) as scratch:
            written = scratch / "pattern"
            written.write_text(text, encoding="utf-8")
            written.replace(place)
    except OSError as error:
        raise OptionError(f"head pattern {str(path)!r} cannot be written: {error}") from error


def _refusal(path: str | Path, reason: str) -> OptionError:
    return OptionError(f"head pattern {str(path)!r}: {reason}")


def _read(place: Path, kv_heads: Sequence[int] | None) -> HeadPattern:
    if place.is_dir():
        return _duo_attention(place)
    if place.name == _SCORES:
        return _duo_attention(place.parent)
    if place.suffix in (".pt", ".pth"):
        return _kvzip(place)
    if place.suffix == ".json":
        values = _mapping(place)
        if "format" in values or "scores" in values:
            return _own(values)
        return _retrieval_heads(values, kv_heads)
    place.stat()  # a file that is not there is not of an unknown form
    raise OptionError(
        f"its form is not known; give a .json or .pt file, or a folder with {_SCORES} and {_CONFIG}"
    )


def _mapping(place: Path) -> dict[str, Any]:
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{place.name} is not JSON") from error
    if not isinstance(values, dict):
        raise OptionError(f"{place.name} must hold an object, not a {type(values).__name__}")
    return values


def _own(values: dict[str, Any]) -> HeadPattern:
    if (found := values.get("format")) != FORMAT:
        raise OptionError(f"its format is {found!r}, but {FORMAT!r} is read; make it again")
    rows = values.get("scores")
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise OptionError("scores must be a list of numbers for each layer")
    pattern = HeadPattern(
        scores=tuple(tuple(map(_number, row)) for row in rows),
        sink_tokens=_tokens(values, "sink_tokens"),
        recent_tokens=_tokens(values, "recent_tokens"),
        model=_text(values, "model"),
        made=_text(values, "made"),
    )
    if values.get("kv_heads") != list(pattern.kv_heads):
        raise OptionError("its scores are not of the shape that kv_heads says; make it again")
    return pattern


def _duo_attention(folder: Path) -> HeadPattern:
    if not (folder / _SCORES).is_file():
        raise OptionError(f"the folder holds no {_SCORES}")
    try:
        text = (folder / _SCORES).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
        rows = [tuple(map(float, line.split("\t"))) for line in lines]
    except ValueError as error:
        raise OptionError(f"{_SCORES} must hold numbers between tabs") from error
    if len({len(row) for row in rows}) > 1:
        raise OptionError(f"the lines of {_SCORES} have different counts of numbers")
    if not (folder / _CONFIG).is_file():
        raise OptionError(f"the folder holds no {_CONFIG} with sink_size and recent_size")
    config = _mapping(folder / _CONFIG)
    sizes = [_tokens(config, name) for name in ("sink_size", "recent_size")]
    if None in sizes:
        raise OptionError(f"{_CONFIG} must say sink_size and recent_size")
    return HeadPattern(
        # Gates leave their range in the last step of training, as those who use them know.
        scores=tuple(tuple(min(max(gate, 0.0), 1.0) for gate in row) for row in rows),
        sink_tokens=sizes[0],
        recent_tokens=sizes[1],
        model=_text(config, "model_name"),
        made="DuoAttention",
    )


def _kvzip(place: Path) -> HeadPattern:
    place.stat()
    import torch

    try:
        loaded = torch.load(place, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, with several lines of advice
        raise OptionError("it holds no tensor that can be loaded without running code") from error
    if not isinstance(loaded, torch.Tensor):
        raise OptionError(f"it must hold a tensor, not a {type(loaded).__name__}")
    scores = loaded
    while scores.ndim > 2 and 1 in scores.shape:
        scores = scores.squeeze(scores.shape.index(1))
    if scores.ndim == 1:  # KVzip leaves out axes of one entry: models of one KV head
        scores = scores[:, None]
    if scores.ndim != 2 or scores.is_complex() or scores.is_quantized:
        raise OptionError(
            f"its tensor must be real, of layers x KV heads, not of shape {tuple(loaded.shape)}"
        )
    rows = scores.to(torch.float64).tolist()
    return HeadPattern(scores=tuple(map(tuple, rows)), made="KVzip")


def _retrieval_heads(values: dict[str, Any], kv_heads: Sequence[int] | None) -> HeadPattern:
    found: dict[tuple[int, int], float] = {}
    for name, scores in values.items():
        match = _QUERY_HEAD.fullmatch(name)
        if match is None:
            raise OptionError(
                f"{name[:40]!r} names no query head; a name is layer-head, such as 16-19"
            )
        if not isinstance(scores, list) or not scores:
            raise OptionError(f"query head {name} must have a list of scores")
        found[int(match[1]), int(match[2])] = sum(map(_number, scores)) / len(scores)
    if not found:
        raise OptionError("it holds no query heads")
    layers, heads = (1 + max(place[axis] for place in found) for axis in (0, 1))
    if len(found) < layers * heads:
        raise OptionError(f"{layers * heads - len(found)} of {layers} x {heads} query heads lack")
    rows = tuple(tuple(found[layer, head] for head in range(heads)) for layer in range(layers))
    grouped = rows if kv_heads is None else _highest_of_groups(rows, kv_heads)
    return HeadPattern(scores=grouped, made="retrieval scores of query heads")


def _highest_of_groups(rows: Scores, kv_heads: Sequence[int]) -> Scores:
    """Return the highest score of the query heads that share a KV head."""
    heads = len(rows[0])
    if len(rows) != len(kv_heads) or any(kv and heads % kv for kv in kv_heads):
        raise OptionError(
            f"it has {counted(len(rows), 'layer')} x {counted(heads, 'query head')}, but the model "
            f"has {shape_text(kv_heads)}; give a pattern of this model"
        )
    return tuple(
        tuple(max(row[head * heads // kv : (head + 1) * heads // kv]) for head in range(kv))
        for row, kv in zip(rows, kv_heads, strict=True)
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"a head's score must be a number, not {str(value)[:40]!r}")
    try:
        return float(value)
    except OverflowError:
        raise OptionError(f"a head's score is too large: {str(value)[:20]}...") from None


def _tokens(values: dict[str, Any], name: str) -> int | None:
    tokens = values.get(name)
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        raise OptionError(f"{name} must be a count of tokens, not {str(tokens)[:40]!r}")
    return tokens


def _text(values: dict[str, Any], name: str) -> str:
    text = values.get(name) or ""
    if not isinstance(text, str):
        raise OptionError(f"{name} must be text, not {str(text)[:40]!r}")
    return text
