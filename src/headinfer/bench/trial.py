"""One trial: `python -m headinfer.bench.trial`, a JSON spec on stdin, a JSON result on stdout.

Load, warm up, note the memory, prefill, decode. The prompt and the tokens fed in decode steps are
drawn from the seed, not from the model: two methods whose likeliest tokens tie in 16 bits then
still see the same input, and every one of their steps can be compared.
"""

import base64
import time
import traceback
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench import child
from headinfer.bench.methods import METHODS, Method
from headinfer.bench.process_memory import PeakRss
from headinfer.bench.result import Status, TrialFailure, TrialResult, to_json
from headinfer.bench.spec import Settings, TrialSpec
from headinfer.errors import HeadInferError, OptionError
from headinfer.units import parse_bytes

_WARM_UP_TOKENS = 512
_WARM_UP_STEPS = 2
_KEPT_LOGITS = 9
"""Rows of logits kept for the comparison: of the prompt and of the first 8 decode steps."""

_INIT_GAIN = 1.75
"""Weights of this standard deviation over the root of the width give attention scores one of 3, so
that heads attend sharply. With stock's 0.02 attention over 32K tokens averages to nearly nothing,
and a lost tile would pass the comparison."""


def torch_device(settings: Settings) -> torch.device:
    """Return where the model goes.

    Raises:
        OptionError: CUDA is asked for and not there.
    """
    name = settings.device
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda' was asked for, but CUDA is not available")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda" if name == "cuda" else "cpu")


def build_model(spec: TrialSpec, device: torch.device) -> PreTrainedModel:
    """Return the model of a trial; the same weights for every method."""
    model = spec.model
    config = LlamaConfig(
        num_hidden_layers=model.layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        max_position_embeddings=spec.context_tokens + spec.new_tokens,
        initializer_range=_INIT_GAIN / model.hidden_size**0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(spec.seed)
    built: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa"
    )
    return built.to(device).eval()


def _tokens(spec: TrialSpec, device: torch.device) -> torch.Tensor:
    """Return prompt and decode tokens, `[1, context_tokens + new_tokens]`."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (1, spec.context_tokens + spec.new_tokens)
    return torch.randint(spec.model.vocab_size, shape, generator=generator).to(device)


def _limit_device_memory(settings: Settings, device: torch.device) -> None:
    """Hold torch's device memory to the budget, for every method alike."""
    if device.type == "cuda" and settings.device_memory != "auto":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(parse_bytes(settings.device_memory) / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(share)


class _Run:
    """Times the calls of one model, and keeps what they predict."""

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self._model = model
        self._synchronize: Callable[[], object] = (
            torch.cuda.synchronize if device.type == "cuda" else lambda: None
        )
        self.greedy_tokens: list[int] = []
        self.logits: list[str] = []

    def step(self, tokens: torch.Tensor, cache: Cache) -> float:
        """Pass `[1, tokens]` through the model; return the seconds to its likeliest next token."""
        self._synchronize()
        start_s = time.perf_counter()
        output = self._model(
            input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        row = output.logits[0, -1]
        token = int(row.argmax())  # waits for the device
        self._synchronize()
        seconds = time.perf_counter() - start_s
        self.greedy_tokens.append(token)
        if len(self.logits) < _KEPT_LOGITS:
            self.logits.append(base64.b64encode(row.float().cpu().numpy().tobytes()).decode())
        return seconds


def _warm_up(method: Method, run: _Run, tokens: torch.Tensor) -> None:
    """Run a short prompt and a few steps, so that no timed call is the first of its kind."""
    prompt_tokens = min(_WARM_UP_TOKENS, tokens.shape[1] - 1)
    end = min(prompt_tokens + _WARM_UP_STEPS, tokens.shape[1])
    cache = method.new_cache(end)
    run.step(tokens[:, :prompt_tokens], cache)
    for position in range(prompt_tokens, end):
        run.step(tokens[:, position : position + 1], cache)


@torch.no_grad()
def run_trial(spec: TrialSpec) -> TrialResult:
    """Load the model and measure one method on it.

    Raises:
        HeadInferError: the method refuses the model, the settings or the memory.
    """
    device = torch_device(spec.settings)
    _limit_device_memory(spec.settings, device)
    model = build_model(spec, device)
    tokens = _tokens(spec, device)
    with closing(METHODS[spec.method](model, spec.settings)) as method:
        _warm_up(method, _Run(model, device), tokens)
        return _measure(spec, method, _Run(model, device), tokens, device)


def _measure(
    spec: TrialSpec, method: Method, run: _Run, tokens: torch.Tensor, device: torch.device
) -> TrialResult:
    all_tokens = spec.context_tokens + spec.new_tokens
    peak = PeakRss()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    link = [method.link_bytes()]
    cache = method.new_cache(all_tokens)
    prefill_s = run.step(tokens[:, : spec.context_tokens], cache)
    link.append(method.link_bytes())
    decode_s = [
        run.step(tokens[:, position : position + 1], cache)
        for position in range(spec.context_tokens, all_tokens)
    ]
    link.append(method.link_bytes())
    kv_host_bytes, kv_device_bytes = method.kv_bytes(cache)
    on_cuda = device.type == "cuda"
    return TrialResult(
        device=device.type,
        prefill_s=prefill_s,
        decode_s=tuple(decode_s),
        greedy_tokens=tuple(run.greedy_tokens),
        logits=tuple(run.logits),
        peak_rss_growth_bytes=peak.growth_bytes(),
        rss_source=peak.source,
        kv_host_bytes=kv_host_bytes,
        kv_device_bytes=kv_device_bytes,
        planned_activation_bytes=method.planned_activation_bytes(all_tokens),
        plan=method.sizes(all_tokens),
        prefill_bytes_to_device=link[1][0] - link[0][0],
        prefill_bytes_to_host=link[1][1] - link[0][1],
        decode_bytes_to_device=link[2][0] - link[1][0],
        decode_bytes_to_host=link[2][1] - link[1][1],
        device_peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
        device_peak_reserved_bytes=torch.cuda.max_memory_reserved() if on_cuda else None,
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def attempt(spec: TrialSpec) -> TrialResult | TrialFailure:
    """Run a trial; errors become a `TrialFailure` that says which."""
    try:
        return run_trial(spec)
    except (HeadInferError, ImportError) as error:
        return TrialFailure(status=Status.CANNOT_RUN, reason=_first_line(error))
    except (MemoryError, RuntimeError) as error:
        # torch's CPU allocator raises a plain RuntimeError.
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if memory or "allocate memory" in str(error) or "not enough memory" in str(error):
            reason = f"out of memory: {_first_line(error)}"
            return TrialFailure(status=Status.CANNOT_RUN, reason=reason)
        failure = error
    except Exception as error:
        failure = error  # type: ignore[assignment]  # any error becomes a row
    traceback.print_exception(failure)
    reason = f"{type(failure).__name__}: {_first_line(failure)}"
    return TrialFailure(status=Status.FAILED, reason=reason)


def _serve(values: dict[str, Any]) -> dict[str, Any]:
    with suppress(OSError):
        # When memory runs out, this process is to die and not the one that started it.
        Path("/proc/self/oom_score_adj").write_text("1000")
    return to_json(attempt(TrialSpec.from_json(values)))


if __name__ == "__main__":
    child.serve(_serve)
