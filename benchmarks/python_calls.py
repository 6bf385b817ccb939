"""Python calls that a decode step or a short prompt makes in each layer, where Python is the bound.

Counts calls of functions in the package's own files, on the simulated device, for four layers of
four KV heads: decode steps after 1000 tokens, and a prompt as long that passes in one chunk and is
resident. The prompt's host memory comes ahead of need, as beside a GPU. The simulated device's own
work, which no GPU needs, is left out. Prints JSON: calls a layer and step, and the frames between
the attention function and a kernel; and calls that each layer of a new cache adds to its prompt
beside its update and attention, as its engine is made.

    python benchmarks/python_calls.py [--top 20]
"""

import argparse
import collections
import inspect
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.attention import AttentionFunctions
from headinfer.integration.layer import OffloadedLayer

_ROOT = str(Path(headinfer.__file__).parent)
_SIMULATOR = (f"{_ROOT}/device/simulated", f"{_ROOT}/device/hazards.py")
_LAYERS, _STEPS, _PROMPT_TOKENS = 4, 10, 1000
_HOST_PIECE_BYTES = 2**28

SETTINGS: dict[str, dict[str, Any]] = {
    "resident": {"resident_tokens": "all"},
    "streamed, all heads x 512": {
        "resident_tokens": 0,
        "tile_heads": "all",
        "tile_tokens": 512,
    },
    "streamed, 1 head x 256": {"resident_tokens": 0, "tile_heads": 1, "tile_tokens": 256},
}


def model(layers: int = _LAYERS) -> LlamaForCausalLM:
    """Return a random model of four KV heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def _name(frame: FrameType) -> str:
    return str(getattr(frame.f_code, "co_qualname", frame.f_code.co_name))  # since Python 3.11


class Counter:
    """A profile function that counts calls of the package's functions."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.deepest: list[str] = []
        self._attend = AttentionFunctions.attend.__code__
        self._of_layers = self._attend, inspect.unwrap(OffloadedLayer.update).__code__
        self._simulating = 0  # calls within the simulator that have not returned
        self._layer: FrameType | None = None  # the call of a layer that has not returned

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        """Count one event."""
        file = frame.f_code.co_filename
        own = file.startswith(_ROOT)
        if event == "c_call":
            if f"{_ROOT}/attend/" in file and not self._simulating:
                self._note_depth(frame)
        elif own and event == "call":
            if self._simulating or file.startswith(_SIMULATOR):
                self._simulating += 1
            else:
                self.calls[f"{file.removeprefix(_ROOT + '/')} {_name(frame)}"] += 1
        elif own and event == "return" and self._simulating:
            self._simulating -= 1

    def in_layers(self, frame: FrameType, event: str, argument: object) -> None:
        """Count one event of a layer's update or attention; leave out what is done once a call."""
        self._count_where(frame, event, argument, within=True)

    def beside_layers(self, frame: FrameType, event: str, argument: object) -> None:
        """Count one event of what `in_layers` leaves out."""
        self._count_where(frame, event, argument, within=False)

    def _count_where(self, frame: FrameType, event: str, argument: object, *, within: bool) -> None:
        if self._layer is None and frame.f_code in self._of_layers:
            self._layer = frame
        if (self._layer is not None) is within:
            self(frame, event, argument)
        if event == "return" and frame is self._layer:
            self._layer = None

    def _note_depth(self, frame: FrameType | None) -> None:
        names: list[str] = []
        while frame is not None and frame.f_code is not self._attend:
            if frame.f_code.co_filename.startswith(_ROOT):
                names.append(_name(frame))
            frame = frame.f_back
        if frame is not None and len(names) > len(self.deepest):
            self.deepest = names[::-1]


def count(llama: LlamaForCausalLM, **options: Any) -> Counter:
    """Return what decode steps that are not captured call, under some options of `attach`."""
    tokens = torch.randint(0, 97, (1, _PROMPT_TOKENS + 3 + _STEPS))
    counter, options = Counter(), {"device": "simulated", "capture": False, **options}
    with headinfer.attach(llama, **options) as offload, torch.no_grad():
        cache = offload.new_cache(2000)
        llama(tokens[:, :_PROMPT_TOKENS], **cache.as_keyword(), logits_to_keep=1)
        for step in range(3 + _STEPS):
            token = tokens[:, _PROMPT_TOKENS + step, None]
            if step >= 3:
                sys.setprofile(counter)
            llama(token, **cache.as_keyword())
            sys.setprofile(None)
    return counter


def count_prompt(llama: LlamaForCausalLM, *, beside: bool = False, **options: Any) -> Counter:
    """Return what a second cache and its prompt call: in its layers' update and attention, or not.

    Args:
        llama: the model.
        beside: whether to count what is beside these.
        **options: of `attach`.
    """
    prompt, counter = torch.randint(0, 97, (1, _PROMPT_TOKENS)), Counter()
    device = SimulatedDevice(host_piece_bytes=_HOST_PIECE_BYTES)
    options = {"device": "simulated", "simulated_device": device, **options}
    with headinfer.attach(llama, **options) as offload, torch.no_grad():
        for profile in (None, counter.beside_layers if beside else counter.in_layers):
            sys.setprofile(profile)
            cache = offload.new_cache()
            llama(prompt, **cache.as_keyword(), logits_to_keep=1)
            sys.setprofile(None)
    return counter


def count_beside(**options: Any) -> Counter:
    """Return what each of four layers adds to a prompt beside its update and attention.

    It is the difference of two models. What is done once a call depends on the machine.
    """
    few, many = (
        count_prompt(model(layers), beside=True, **options) for layers in (_LAYERS, 2 * _LAYERS)
    )
    many.calls.subtract(few.calls)
    return many


def result(counter: Counter, top: int, each: int) -> dict[str, Any]:
    """Return what is printed of the calls counted in so many layers."""
    found: dict[str, Any] = {
        "calls": round(sum(counter.calls.values()) / each, 1),
        "frames": len(counter.deepest),
        "deepest": counter.deepest,
    }
    if top:
        found["most"] = {f: n / each for f, n in counter.calls.most_common(top)}
    return found


def main() -> None:
    """Count under each setting, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--top", type=int, default=0, help="also list the most called functions")
    top = parser.parse_args().top
    llama, results = model(), {}
    for name, options in SETTINGS.items():
        results[name] = result(count(llama, **options), top, _STEPS * _LAYERS)
    sizes = {"chunk_tokens": 1024, "resident_tokens": 1024}
    results["a prompt, resident"] = result(count_prompt(llama, **sizes), top, _LAYERS)
    results["beside its layers"] = result(count_beside(**sizes), top, _LAYERS)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
