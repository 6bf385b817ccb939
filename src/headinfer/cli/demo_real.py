"""`headinfer demo --model smollm2`: a trained model answers questions about a real document."""

import textwrap
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from headinfer.cli.console import EXIT_UNEXPECTED, report, stderr_console, stdout_console
from headinfer.cli.demo_parts import (
    choose_demo_device,
    excerpt,
    shared_tokens,
    with_small_tiles,
)
from headinfer.cli.interrupt import Interrupt
from headinfer.cli.load import NamedSource, calm_transformers, prepare_cpu, share_cores
from headinfer.cli.progress import PrefillBar, format_duration
from headinfer.cli.render import print_plan, print_rows, summary_rows
from headinfer.errors import OptionError
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.generation.prompt import encode_prompt
from headinfer.generation.text import TextCollector
from headinfer.plan.options import Options

if TYPE_CHECKING:
    from headinfer.demo.manual import Manual

TOKENS = "7K"
_MAX_ANSWER_TOKENS = 16
_EXCERPT_WIDTH = 74
_ROOM_TOKENS = 128
"""Left for the chat template, a question and its answer, of the positions a model has."""


def run(name: str, num_tokens: int, options: Options, *, verbose: bool) -> int:
    """Show all of it; return the exit code."""
    share_cores()
    started_s = time.perf_counter()
    console = stdout_console()
    console.print(f"[bold]HeadInfer demo:[/] {escape(name)} reads a real document\n")
    with stderr_console().status(f"loading {escape(name)}"):
        calm_transformers(verbose=verbose)
        prepare_cpu()
        device = choose_demo_device(options)
        source = NamedSource(name=name, local_files_only=True)
        config = load_config(source)
        _check_attention(name, config)
        tokenizer = load_tokenizer(source)
        manual = _manual(name, tokenizer, config, num_tokens)
        model, _ = load_model(source, config, dtype="auto", device=device)
        prompts = [_encode(tokenizer, manual, hidden.question) for hidden in manual.hidden]
    if device != "cpu":
        options = with_small_tiles(options, manual.num_tokens)
    _print_manual(console, manual)
    interrupt = Interrupt(stderr_console())
    asker = _Asker(model, tokenizer, prompts, interrupt)
    failure: BaseException | None = None
    try:
        with interrupt.handling():
            stock = asker.ask_stock()
            same, right = _ask(console, asker, manual, stock, options, device, name)
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    if failure is not None:
        return report(failure)
    count = len(manual.hidden)
    console.print(
        f"\n[bold {'green' if same == count else 'red'}]{same} of {count} as stock answers[/], "
        f"{right} of {count} right, {format_duration(time.perf_counter() - started_s)} in all"
    )
    return 0 if same == count else EXIT_UNEXPECTED


def _check_attention(name: str, config: Any) -> None:
    """Refuse models whose stock cache cannot go back to the document after an answer.

    Raises:
        OptionError: some layers see a window, or keep a state.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        raise OptionError(f"--model {name}: the demo needs full attention; take smollm2")


def _manual(name: str, tokenizer: Any, config: Any, num_tokens: int) -> "Manual":
    from headinfer.cli.load import max_positions
    from headinfer.demo.manual import make_manual

    if not tokenizer.chat_template:
        raise OptionError(f"--model {name}: it has no chat template to ask it by; take smollm2")
    most = max_positions(config) - _ROOM_TOKENS
    if 0 < most < num_tokens:
        raise OptionError(
            f"--tokens {num_tokens}: {name} was made for {most + _ROOM_TOKENS} positions, of which "
            f"questions take {_ROOM_TOKENS}; give {most} or less"
        )
    try:
        return make_manual(num_tokens, lambda text: len(tokenizer(text)["input_ids"]))
    except ValueError as error:
        raise OptionError(f"--tokens {num_tokens}: {error}") from error


def _encode(tokenizer: Any, manual: "Manual", question: str) -> list[int]:
    return encode_prompt(tokenizer, [{"role": "user", "content": manual.message(question)}])


def _print_manual(console: Console, manual: "Manual") -> None:
    """Print what the document is, and the lines around one of its notes."""
    middle = len(manual.hidden) // 2
    sentence = manual.hidden[middle].sentence
    console.print(
        f"The document: {manual.num_tokens:,} tokens of Python's own manual. "
        f"{len(manual.hidden)} sentences are hidden in it\nthat are in no manual. "
        f"One of them, at {manual.depths[middle]:.0%} of the text:\n"
    )
    for line in textwrap.wrap(excerpt(manual.text, sentence), _EXCERPT_WIDTH):
        console.print(f"  [dim]|[/] {escape(line)}")
    console.print()


class _Asker:
    """A model that is asked the same questions with its own cache, and with ours."""

    def __init__(
        self, model: Any, tokenizer: Any, prompts: list[list[int]], interrupt: Interrupt
    ) -> None:
        self.prompts = prompts
        self.shared_tokens = shared_tokens(prompts)
        self.max_tokens = max(map(len, prompts)) + _MAX_ANSWER_TOKENS
        self.interrupt = interrupt
        self.model = model
        self._tokenizer = tokenizer

    def ask_stock(self) -> list[tuple[list[int], str]]:
        """Return what stock transformers answers, from a cache of its own."""
        from transformers import DynamicCache

        with stderr_console().status("stock transformers reads and answers, for comparison"):
            cache = DynamicCache(config=self.model.config)
            self.read(cache)
            count = len(self.prompts)
            return [self.answer(number, cache, lambda _: None) for number in range(count)]

    def read(self, cache: Any) -> None:
        """Take the document, with what stands before it in every prompt, into a cache."""
        import torch

        from headinfer.integration.calls import cache_argument

        ids = self._tensor(self.prompts[0][: self.shared_tokens])
        with torch.no_grad():
            self.model(
                input_ids=ids,
                use_cache=True,
                logits_to_keep=1,
                **cache_argument(self.model, cache),
            )

    def answer(self, number: int, cache: Any, write: Any) -> tuple[list[int], str]:
        """Return an answer's tokens and text; question and answer leave the cache again."""
        import torch
        from transformers import StoppingCriteriaList

        from headinfer.integration.calls import cache_argument

        self.interrupt.check()
        collector = TextCollector(self._tokenizer, write)

        def ended(input_ids: Any, _scores: Any, **_keywords: Any) -> Any:
            """Stop after a sentence; stop strings of transformers do not know all tokenizers."""
            sentence = any(mark in collector.text for mark in ".\n")
            return input_ids.new_full((1,), sentence, dtype=torch.bool)

        prompt = self._tensor(self.prompts[number])
        self.model.generate(
            input_ids=prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            **cache_argument(self.model, cache),
            do_sample=False,
            max_new_tokens=_MAX_ANSWER_TOKENS,
            streamer=collector,
            stopping_criteria=StoppingCriteriaList([self.interrupt.stopping_criterion, ended]),
        )
        cache.crop(self.shared_tokens - cache.get_seq_length())
        self.interrupt.check()
        return collector.ids, collector.text

    def _tensor(self, ids: list[int]) -> Any:
        import torch

        return torch.tensor([ids], device=self.model.device)


def _ask(
    console: Console,
    asker: _Asker,
    manual: "Manual",
    stock: list[tuple[list[int], str]],
    options: Options,
    device: str,
    name: str,
) -> tuple[int, int]:
    """Print plan, answers and statistics; return how many are as stock's, and how many right."""
    from headinfer.api import attach

    def write(piece: str) -> None:
        console.print(piece.replace("\n", " "), end="", markup=False)
        console.file.flush()

    same = right = 0
    bar = PrefillBar(stderr_console(), asker.shared_tokens, asker.interrupt.check)
    keywords = options.keywords() | {"device": device, "progress": bar.update}
    with attach(asker.model, **keywords) as offload:
        plan = offload.session.plan_for(1, asker.max_tokens)
        print_plan(console, name, str(asker.model.dtype).removeprefix("torch."), plan)
        console.print()
        cache = offload.new_cache(asker.max_tokens)
        with bar:
            asker.read(cache)
        console.print()
        for idx, hidden in enumerate(manual.hidden):
            console.print(
                f"{idx + 1}. {escape(hidden.question)} [dim](at {manual.depths[idx]:.0%})[/]"
            )
            console.print("  ", end="")
            ids, text = asker.answer(idx, cache, write)
            is_right = hidden.answer.casefold() in text.casefold()
            as_stock = ids == stock[idx][0]
            same, right = same + as_stock, right + is_right
            mark = "[green]right[/]" if is_right else f"[yellow]wrong[/], it is: {hidden.answer}"
            beside = "as stock" if as_stock else f"[red]STOCK:[/] {escape(stock[idx][1].strip())}"
            console.print(f"\n  {mark}; {beside}")
        console.print()
        print_rows(console, summary_rows(offload.stats, plan))
    return same, right
