"""`headinfer demo`: the embedded model answers questions about a long document, as one watches."""

import textwrap
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headinfer.cli import options as opt
from headinfer.cli.console import (
    EXIT_UNEXPECTED,
    report,
    reporting_errors,
    stderr_console,
    stdout_console,
)
from headinfer.cli.demo_parts import (
    choose_demo_device,
    excerpt,
    shared_tokens,
    with_small_tiles,
)
from headinfer.cli.interrupt import Interrupt
from headinfer.cli.load import (
    DEMO_MODEL,
    NamedSource,
    calm_transformers,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.progress import PrefillBar, format_duration
from headinfer.cli.render import print_plan, print_rows, summary_rows
from headinfer.errors import OptionError
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.generation.text import TextCollector
from headinfer.plan.options import Options
from headinfer.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from headinfer.demo import Document, Fact
    from headinfer.offload import Offload

_TOKENS = "128K"
_MAX_ANSWER_TOKENS = 16
_EXCERPT_WIDTH = 88


@opt.with_flags(
    "device",
    "device_memory",
    "host_memory",
    "chunk_tokens",
    "tile_heads",
    "tile_tokens",
    "overlap",
    "capture",
    device="cpu, cuda, simulated (a device on the CPU with memory of its own, which checks every "
    "copy) or auto: CUDA if there is one, else simulated.",
)
def demo(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="demo, or a trained one that can chat, such as smollm2: it is asked about a real "
            "document, and stock's answers are compared.",
        ),
    ] = DEMO_MODEL,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "-t",
            metavar="COUNT",
            help="Length of the document.",
            show_default="128K; 7K with another model",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Another seed, another document, for demo.")
    ] = 0,
    flags: dict[str, Any],
    verbose: opt.Verbose = False,
) -> None:
    """Watch a tiny model find eight facts hidden in a document of 128K tokens.

    The model reads the document once. The KV cache stays in CPU memory, and
    each question continues from it. Exit code 1 if any answer is wrong.
    """
    with reporting_errors():
        options = Options.parse(**flags)
        if model == DEMO_MODEL:
            code = _run(parse_tokens(tokens or _TOKENS, "--tokens"), seed, options, verbose=verbose)
        else:
            from headinfer.cli import demo_real

            if seed:
                raise OptionError(
                    f"--seed {seed}: it chooses a document for the model demo alone; leave it out"
                )
            num_tokens = parse_tokens(tokens or demo_real.TOKENS, "--tokens")
            code = demo_real.run(model, num_tokens, options, verbose=verbose)
        if code:
            raise typer.Exit(code)


def _run(num_tokens: int, seed: int, options: Options, *, verbose: bool) -> int:
    """Show all of it; return the exit code."""
    share_cores()

    from headinfer.demo import make_document
    from headinfer.demo.layout import MAX_TOKENS

    started_s = time.perf_counter()
    console = stdout_console()
    if num_tokens > MAX_TOKENS:
        raise OptionError(
            f"--tokens {format_tokens(num_tokens)}: the demo model finds facts in at most "
            f"{format_tokens(MAX_TOKENS)} tokens"
        )
    try:
        document = make_document(num_tokens, seed)
    except ValueError as error:
        raise OptionError(f"--tokens {num_tokens}: {error}") from error
    console.print("[bold]HeadInfer demo:[/] a tiny model looks for facts in a long document\n")
    print_document(console, document)
    with stderr_console().status("loading the model"):
        calm_transformers(verbose=verbose)
        prepare_cpu()
        device = choose_demo_device(options)
        if device != "cpu":
            options = with_small_tiles(options, num_tokens)
        source = NamedSource(name=DEMO_MODEL, local_files_only=True)
        config = load_config(source)
        tokenizer = load_tokenizer(source)
        model, _ = load_model(source, config, dtype="auto", device=device)
        prompts = _encode(tokenizer, document)

        from headinfer.api import attach
    interrupt = Interrupt(stderr_console())
    num_shared = shared_tokens(prompts)
    bar = PrefillBar(stderr_console(), num_shared, interrupt.check)
    keywords = options.keywords() | {"device": device, "progress": bar.update}
    with attach(model, **keywords) as offload:
        reader = _Reader(console, model, tokenizer, offload, prompts, num_shared, interrupt)
        plan = offload.session.plan_for(1, reader.max_tokens)
        print_plan(console, "the demo model", str(model.dtype).removeprefix("torch."), plan)
        console.print()
        failure: BaseException | None = None
        try:
            with interrupt.handling():
                reader.read(bar)
                console.print()
                for number, fact in enumerate(document.facts, start=1):
                    reader.ask(number, fact)
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        if offload.stats.prefill_tokens:
            console.print()
            print_rows(console, summary_rows(offload.stats, plan))
        if failure is not None:
            return report(failure)
    wrong = len(document.facts) - reader.num_right
    console.print(
        f"\n[bold {'red' if wrong else 'green'}]{reader.num_right} of {len(document.facts)} right"
        f"[/], {format_duration(time.perf_counter() - started_s)} in all"
    )
    return EXIT_UNEXPECTED if wrong else 0


def _encode(tokenizer: Any, document: "Document") -> list[list[int]]:
    from headinfer.demo.evaluate import encode_prompts

    return encode_prompts(tokenizer, document)


def print_document(console: Console, document: "Document") -> None:
    """Print what the document is, and the lines around one of its facts."""
    fact = document.facts[len(document.facts) // 2]
    console.print(
        f"The document: {document.num_tokens:,} tokens of a town's chronicle. "
        f"{len(document.facts)} facts are hidden in it,\n"
        f"among {len(document.distractors):,} others of the same form. "
        f"One of them, at {fact.depth:.0%} of the text:\n"
    )
    for line in textwrap.wrap(excerpt(document.text, fact.number), _EXCERPT_WIDTH):
        marked = escape(line).replace(fact.number, f"[bold yellow]{fact.number}[/]")
        console.print(f"  [dim]|[/] {marked}")
    console.print()


class _Reader:
    """A model with the document in its cache.

    Args:
        console: on stdout.
        model: attached.
        tokenizer: its.
        offload: the attachment.
        prompts: token ids of one prompt for each question.
        shared_tokens: how many tokens at their beginning are the same.
        interrupt: looked at between tokens.

    Attributes:
        max_tokens: the most tokens the cache will hold.
        num_right: right answers so far.
    """

    def __init__(
        self,
        console: Console,
        model: Any,
        tokenizer: Any,
        offload: "Offload",
        prompts: list[list[int]],
        shared_tokens: int,
        interrupt: Interrupt,
    ) -> None:
        self.max_tokens = max(map(len, prompts)) + _MAX_ANSWER_TOKENS
        self.num_right = 0
        self._console = console
        self._model = model
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._shared_tokens = shared_tokens
        self._interrupt = interrupt
        self._cache = offload.new_cache(self.max_tokens)

    def _tensor(self, ids: list[int]) -> Any:
        import torch

        return torch.tensor([ids], device=self._model.device)

    def read(self, bar: PrefillBar) -> None:
        """Take the document, with what stands before it in every prompt, into the cache."""
        import torch

        from headinfer.integration.calls import cache_argument

        document = self._tensor(self._prompts[0][: self._shared_tokens])
        with torch.no_grad(), bar:
            self._model(
                input_ids=document,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self._model, self._cache),
            )

    def ask(self, number: int, fact: "Fact") -> None:
        """Print a question and the answer as it comes, then take both out of the cache again."""
        from transformers import StoppingCriteriaList

        from headinfer.integration.calls import cache_argument

        self._interrupt.check()
        self._console.print(f"{number}. {escape(fact.question)} [dim](at {fact.depth:.0%})[/]")
        self._console.print("  ", end="")
        answer = TextCollector(self._tokenizer, self._print_piece)
        prompt = self._tensor(self._prompts[number - 1])
        self._model.generate(
            input_ids=prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            **cache_argument(self._model, self._cache),
            do_sample=False,
            max_new_tokens=_MAX_ANSWER_TOKENS,
            streamer=answer,
            stopping_criteria=StoppingCriteriaList([self._interrupt.stopping_criterion]),
        )
        self._cache.crop(self._shared_tokens - self._cache.get_seq_length())
        if self._interrupt.requested:
            self._console.print()
        self._interrupt.check()
        right = answer.text.strip() == fact.answer
        self.num_right += right
        mark = "[green]right[/]" if right else f"[red]WRONG[/], it is: {escape(fact.answer)}"
        self._console.print(f"  {mark}")

    def _print_piece(self, piece: str) -> None:
        self._console.print(piece, end="", markup=False)
        self._console.file.flush()
