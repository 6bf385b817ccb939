"""`headinfer generate`: continue a prompt of any length."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headinfer.cli import options as opt
from headinfer.cli.console import report, reporting_errors, stderr_console
from headinfer.cli.interrupt import Interrupt
from headinfer.cli.load import (
    DEMO_MODEL,
    ModelSource,
    calm_transformers,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.output import check_writable
from headinfer.cli.progress import PrefillBar
from headinfer.cli.prompt import check_length, encode_prompt, read_prompt
from headinfer.cli.render import (
    plan_as_json,
    print_plan,
    print_rows,
    stats_as_json,
    summary_rows,
)
from headinfer.cli.sampling import GenerationOptions
from headinfer.cli.streamer import TextCollector
from headinfer.errors import OptionError

if TYPE_CHECKING:
    from headinfer.api import Offload
    from headinfer.plan.plan import Plan
    from headinfer.trace import Trace

_PROMPT_PANEL = "Prompt"
_SAMPLING_PANEL = "Generation (defaults: the model's own)"


def _prompt_option(*flags: str, help_text: str, metavar: str = opt.NO_VALUE) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=_PROMPT_PANEL)


def _model_option(*flags: str, help_text: str, metavar: str = opt.NO_VALUE) -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=opt.MODEL_PANEL)


def _sampling_option(*flags: str, help_text: str, metavar: str = "N") -> Any:
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=_SAMPLING_PANEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """All that `generate` was asked, checked as far as it can be without the model."""

    text: str
    raw: bool
    allow_long: bool
    source: ModelSource
    dtype: str
    memory: opt.MemoryOptions
    generation: GenerationOptions
    seed: int | None
    trace: str | None
    threads: int | None
    as_json: bool
    quiet: bool
    verbose: bool


def generate(
    prompt: Annotated[
        str | None, _prompt_option("--prompt", "-p", help_text="The prompt.", metavar="TEXT")
    ] = None,
    prompt_file: Annotated[
        str | None,
        _prompt_option(
            "--prompt-file",
            "-f",
            help_text="A UTF-8 text file that comes before the prompt; -: stdin.",
            metavar="PATH",
        ),
    ] = None,
    raw: Annotated[
        bool, _prompt_option("--raw", help_text="Leave out the model's chat template.")
    ] = False,
    allow_long_prompt: Annotated[
        bool,
        _prompt_option(
            "--allow-long-prompt", help_text="Run prompts beyond the positions of the model."
        ),
    ] = False,
    model: Annotated[
        str,
        _model_option(
            "--model",
            "-m",
            help_text="A folder or id of a transformers model; demo: the embedded one.",
            metavar="ID_OR_PATH",
        ),
    ] = DEMO_MODEL,
    dtype: opt.Dtype = opt.DtypeChoice.AUTO,
    device: opt.Device = opt.DeviceChoice.AUTO,
    local_files_only: Annotated[
        bool, _model_option("--local-files-only", help_text="Never ask the model hub.")
    ] = False,
    trust_remote_code: Annotated[
        bool, _model_option("--trust-remote-code", help_text="Run code that comes with the model.")
    ] = False,
    threads: opt.Threads = None,
    device_memory: opt.DeviceMemory = "auto",
    host_memory: opt.HostMemory = "auto",
    chunk_tokens: opt.ChunkTokens = "auto",
    tile_heads: opt.TileHeads = "auto",
    tile_tokens: opt.TileTokens = "auto",
    resident_tokens: opt.ResidentTokens = "auto",
    host_attention: opt.HostAttention = "auto",
    no_overlap: opt.NoOverlap = False,
    max_new_tokens: Annotated[
        int, _sampling_option("--max-new-tokens", "-n", help_text="The most tokens to generate.")
    ] = 256,
    do_sample: Annotated[
        bool | None,
        _sampling_option(
            "--do-sample/--no-do-sample",
            help_text="Sample, or take the likeliest token; temperature, top-k, top-p and min-p "
            "turn sampling on.",
            metavar=opt.NO_VALUE,
        ),
    ] = None,
    temperature: Annotated[
        float | None, _sampling_option("--temperature", help_text="Above 1 more varied.")
    ] = None,
    top_k: Annotated[
        int | None, _sampling_option("--top-k", help_text="Sample from so many tokens; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        _sampling_option("--top-p", help_text="Sample from this share of probability."),
    ] = None,
    min_p: Annotated[
        float | None,
        _sampling_option(
            "--min-p", help_text="Leave out tokens below this share of the likeliest."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None, _sampling_option("--repetition-penalty", help_text="1: none.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        _sampling_option(
            "--no-repeat-ngram-size", help_text="Never repeat so many tokens; 0: off."
        ),
    ] = None,
    num_beams: Annotated[
        int | None,
        _sampling_option("--num-beams", help_text="Beams; from 2 on, text comes at the end."),
    ] = None,
    length_penalty: Annotated[
        float | None,
        _sampling_option("--length-penalty", help_text="Of beams; above 0 prefers longer ones."),
    ] = None,
    prompt_lookup_num_tokens: Annotated[
        int | None,
        _sampling_option(
            "--prompt-lookup-num-tokens",
            help_text="Guess so many tokens at a time from the prompt: same text, fewer steps.",
        ),
    ] = None,
    seed: Annotated[
        int | None, _sampling_option("--seed", help_text="Makes sampling repeatable.")
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="PATH",
            help="Write what the first decode steps did when, in Chrome's trace format.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar=opt.NO_VALUE,
            help="Print one JSON object with text, plan and statistics to stdout.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Continue a prompt: text to stdout as it comes, all else to stderr.

    The KV cache lies in host memory and passes through the device in tiles of heads x tokens, so
    that the prompt may be far longer than the device's memory allows otherwise.

    [bold]headinfer generate --model ID --prompt-file book.txt --prompt "Who ...?"[/]
    """
    with reporting_errors():
        check_writable("--trace", trace)
        request = Request(
            generation=GenerationOptions(
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                no_repeat_ngram_size=no_repeat_ngram_size,
                num_beams=num_beams,
                length_penalty=length_penalty,
                prompt_lookup_num_tokens=prompt_lookup_num_tokens,
            ),
            memory=opt.MemoryOptions(
                device=device.value,
                device_memory=device_memory,
                host_memory=host_memory,
                chunk_tokens=chunk_tokens,
                tile_heads=tile_heads,
                tile_tokens=tile_tokens,
                overlap=not no_overlap,
                resident_tokens=resident_tokens,
                host_attention=host_attention,
            ),
            text=read_prompt(prompt, prompt_file),
            raw=raw,
            allow_long=allow_long_prompt,
            source=ModelSource(
                name=model,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
            ),
            dtype=dtype.value,
            seed=seed,
            trace=trace,
            threads=threads,
            as_json=as_json,
            quiet=quiet,
            verbose=verbose,
        )
        _load_and_run(request)


def _load_and_run(request: Request) -> None:
    """Load in the order of cost: what can be refused early is."""
    console = stderr_console(quiet=request.quiet)
    share_cores()
    new_tokens = request.generation.max_new_tokens
    with console.status(f"loading {escape(request.source.name)}"):
        calm_transformers(verbose=request.verbose)
        prepare_cpu(request.threads)
        device = choose_device(request.memory)
        config = load_config(request.source)
        tokenizer = load_tokenizer(request.source)
        ids = encode_prompt(tokenizer, request.text, raw=request.raw)
        positions = max_positions(config)
        note = check_length(len(ids), new_tokens, positions, allow_long=request.allow_long)
        model = load_model(request.source, config, dtype=request.dtype, device=device)

        from headinfer.api import attach
    if note:
        console.print(f"note: {note}", markup=False)
    interrupt = Interrupt(console)
    bar = PrefillBar(console, len(ids), interrupt.check)
    keywords = request.memory.attach_keywords(device)
    with attach(model, **keywords, progress=bar.update) as offload:
        plan = offload.plan_for(request.generation.rows, len(ids) + new_tokens)
        print_plan(console, request.source.name, str(model.dtype).removeprefix("torch."), plan)
        run = _Run(request, console, model, tokenizer, offload, plan)
        run.generate(ids, bar, interrupt)
        code = run.finish()
    if code:
        raise typer.Exit(code)


class _Run:
    """One call of `generate`, and what is told of it however it ends."""

    def __init__(
        self,
        request: Request,
        console: Console,
        model: Any,
        tokenizer: Any,
        offload: "Offload",
        plan: "Plan",
    ) -> None:
        self._request = request
        self._console = console
        self._model = model
        self._offload = offload
        self._plan = plan
        self._collector = TextCollector(tokenizer, self._write)
        self._failure: BaseException | None = None
        self._prompt_tokens = 0
        self._interrupted = False
        self._trace: Trace | None = None

    def _write(self, piece: str) -> None:
        if not self._request.as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def generate(self, ids: list[int], bar: PrefillBar, interrupt: Interrupt) -> None:
        """Generate into the collector; failures are kept for `finish`."""
        import torch

        self._prompt_tokens = len(ids)
        prompt = torch.tensor([ids], device=self._model.device)
        if self._request.seed is not None:
            torch.manual_seed(self._request.seed)
        try:
            with interrupt.handling():
                with bar:
                    rows = self._generate_rows(prompt, interrupt)
                if self._request.generation.rows > 1:
                    self._collector.add(self._without_padding(rows[0, len(ids) :].tolist()))
                self._collector.end()
        except BrokenPipeError:
            raise
        except KeyboardInterrupt:
            interrupt.requested = True
        except Exception as error:
            self._failure = error
            if isinstance(error, ValueError) and not self._offload.stats.prefill_tokens:
                # Raised before the model ran: transformers refuses these settings together.
                self._failure = OptionError(f"generation options: {error}")
        finally:
            if self._trace is not None:
                self._trace.finish()
        self._interrupted = interrupt.requested

    def _generate_rows(self, prompt: Any, interrupt: Interrupt) -> Any:
        from transformers import StoppingCriteriaList

        from headinfer.integration.calls import cache_argument

        settings = self._request.generation
        criteria = StoppingCriteriaList([interrupt.stopping_criterion])
        if self._request.trace is not None:
            criteria.append(self._trace_criterion(Path(self._request.trace)))
        cache = self._offload.new_cache(prompt.shape[1] + settings.max_new_tokens)
        return self._model.generate(
            input_ids=prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            **cache_argument(self._model, cache),
            streamer=self._collector if settings.rows == 1 else None,
            stopping_criteria=criteria,
            **settings.keywords(),
        )

    def _trace_criterion(self, path: Path) -> Callable[..., Any]:
        """Return a stopping criterion that stops nothing and lets the trace go on."""
        import torch

        from headinfer.trace import Trace

        trace = self._trace = Trace(path)

        def criterion(input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
            trace.advance()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return criterion

    def _end_ids(self) -> set[int]:
        end = self._model.generation_config.eos_token_id
        return {int(i) for i in (end if isinstance(end, list) else [end]) if i is not None}

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Cut a beam after its end token."""
        end_ids = self._end_ids()
        for position, token_id in enumerate(ids):
            if token_id in end_ids:
                return ids[: position + 1]
        return ids

    def _finish_reason(self) -> str:
        if self._failure is not None:
            return "error"
        if self._interrupted:
            return "interrupted"
        ids = self._collector.ids
        return "stop" if ids and ids[-1] in self._end_ids() else "length"

    def finish(self) -> int:
        """Complete stdout, print the summary and the failure if any; return the exit code."""
        self._collector.end()
        if self._request.as_json:
            print(json.dumps(self._as_json(), indent=2, ensure_ascii=False), flush=True)
        elif self._collector.text and not self._collector.text.endswith("\n"):
            self._write("\n")
        if self._offload.stats.prefill_tokens:
            self._console.print()
            print_rows(self._console, summary_rows(self._offload.stats, self._plan))
        if self._trace is not None:
            told = f"written to {self._request.trace}" if self._trace.written else "no decode step"
            self._console.print(f"trace: {told}", markup=False)
        if self._failure is not None:
            return report(self._failure)
        if self._interrupted:
            return report(KeyboardInterrupt())
        return 0

    def _as_json(self) -> dict[str, Any]:
        return {
            "text": self._collector.text,
            "finish_reason": self._finish_reason(),
            "model": self._request.source.name,
            "prompt_tokens": self._prompt_tokens,
            "new_tokens": len(self._collector.ids),
            "seed": self._request.seed,
            "plan": plan_as_json(self._plan),
            "stats": stats_as_json(self._offload.stats),
        }
