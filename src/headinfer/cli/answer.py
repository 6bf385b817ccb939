"""One answer of `headinfer generate`: generated, written and told of, however it ends."""

import contextlib
import errno
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from headinfer.cli.console import EXIT_UNEXPECTED, discard_stdout, print_error, report
from headinfer.cli.interrupt import Interrupt, Stopped
from headinfer.cli.load import NamedSource
from headinfer.cli.progress import PrefillBar
from headinfer.cli.render import plan_as_json, print_rows, stats_as_json, summary_rows
from headinfer.cli.sampling import GenerationOptions
from headinfer.cli.session_options import save_at_the_end
from headinfer.errors import HeadInferError
from headinfer.generation.pace import Number
from headinfer.generation.settings import Settings
from headinfer.plan.options import Options

if TYPE_CHECKING:
    from headinfer.engine.stats import Stats
    from headinfer.generation.call import Generation
    from headinfer.generation.drafts import Drafts
    from headinfer.integration.cache import OffloadedCache
    from headinfer.offload import Offload
    from headinfer.plan.plan import Plan
    from headinfer.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request: all that `generate` was asked, checked as far as it can be without the model."""

    text: str
    system: str | None
    template_values: dict[str, Any]
    raw: bool
    allow_long: bool
    source: NamedSource
    dtype: str
    options: Options
    generation: GenerationOptions
    stop: tuple[str, ...]
    seed: int | None
    trace: str | None
    session: str | None
    save_session: str | None
    threads: int | None
    as_json: bool
    quiet: bool
    verbose: bool
    tensor_parallel: bool = False
    draft: Number | None = None
    assistant: str | None = None


class _StdoutLost(Exception):
    """Nothing more can be written to stdout."""


class Answer:
    """An answer: one call of a model's `generate`, and what is told of it however it ends.

    Args:
        request: what was asked.
        settings: of the generation, the model's own taken into account.
        console: on stderr.
        model: attached.
        tokenizer: its.
        offload: the attachment.
        plan: of the cache.
        drafts: what is asked of them; None leaves them to the settings.
    """

    def __init__(
        self,
        request: Request,
        settings: Settings,
        console: Console,
        model: Any,
        tokenizer: Any,
        offload: "Offload",
        plan: "Plan",
        drafts: "Drafts | None" = None,
    ) -> None:
        self._request = request
        self._settings = settings
        self._console = console
        self._model = model
        self._tokenizer = tokenizer
        self._offload = offload
        self._plan = plan
        self._drafts = drafts
        self._generation: Generation | None = None
        self._failure: BaseException | None = None
        self._stdout_error: OSError | None = None
        self._stopped: Stopped | None = None
        self._trace: Trace | None = None
        self._bar: PrefillBar | None = None
        self._cache: OffloadedCache | None = None
        self._cached_tokens = 0

    def _stream(self, piece: str) -> None:
        if not self._request.as_json:
            self._write(piece)
            if self._stdout_error is not None:
                raise _StdoutLost  # nobody reads what else would be generated

    def _write(self, text: str) -> None:
        """Write to stdout; once that fails nothing more is tried."""
        if self._stdout_error is not None:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            self._stdout_error = error
            discard_stdout()

    def generate(
        self, ids: list[int], cache: "OffloadedCache", bar: PrefillBar, interrupt: Interrupt
    ) -> None:
        """Generate, and write text as it comes; failures are kept for `finish`.

        Args:
            ids: the prompt.
            cache: to be filled; it may hold what the prompt begins with.
            bar: shows what is read.
            interrupt: asked whether to stop.
        """
        import torch

        from headinfer.generation.call import Generation

        self._bar, self._cache, self._cached_tokens = bar, cache, cache.get_seq_length()
        if self._request.seed is not None:
            torch.manual_seed(self._request.seed)
        criteria = [interrupt.stopping_criterion]
        if self._request.trace is not None:
            criteria.append(self._trace_criterion(Path(self._request.trace)))
        self._generation = Generation(
            self._model,
            self._tokenizer,
            self._offload.session,
            self._settings,
            self._stream,
            cache=cache,
            progress=bar.update,
            criteria=criteria,
            stop=self._request.stop,
            drafts=self._drafts,
        )
        try:
            with bar:
                self._generation.run(ids)
        except _StdoutLost:
            pass
        except KeyboardInterrupt:
            interrupt.requested = True
        except Exception as error:
            self._failure = error
        finally:
            if self._trace is not None:
                self._trace.finish()
        self._stopped = interrupt.error if interrupt.requested else None

    def _trace_criterion(self, path: Path) -> Callable[..., Any]:
        """Return a stopping criterion that stops nothing and lets the trace go on."""
        import torch

        from headinfer.trace import Trace

        trace = self._trace = Trace(path)

        def criterion(input_ids: Any, _scores: Any, **_kwargs: Any) -> Any:
            trace.advance()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        return criterion

    def _finish_reason(self, generation: "Generation") -> str:
        if self._failure is not None:
            return "error"
        return "interrupted" if self._stopped is not None else generation.finish_reason

    def complete(self) -> str:
        """Complete stdout with what was held back; return the text."""
        generation = self._generation
        assert generation is not None
        with contextlib.suppress(_StdoutLost):
            generation.end()
        if self._request.as_json:
            document = self._as_json(generation)
            self._write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        elif generation.text and not generation.text.endswith("\n"):
            self._write("\n")
        return generation.text

    def finish(self) -> int:
        """Complete stdout, print the summary and the failure if any; return the exit code."""
        self.complete()
        unsaved = self._save()
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._print_summary()
        code = 0 if unsaved is None else report(unsaved)
        if self._failure is not None:
            return report(self._failure)
        if self._stopped is not None:
            return report(self._stopped)
        return code or self.report_lost()

    @property
    def failure(self) -> BaseException | None:
        """What the generation failed with."""
        return self._failure

    @property
    def stopped(self) -> Stopped | None:
        """The signal that ended it early."""
        return self._stopped

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop", "time", "length", "interrupted" or "error"."""
        assert self._generation is not None
        return self._finish_reason(self._generation)

    @property
    def new_tokens(self) -> int:
        """Tokens that were generated."""
        return 0 if self._generation is None else len(self._generation.ids)

    def _save(self) -> HeadInferError | None:
        """Save the session, if that is asked for; return why it could not be."""
        name, cache = self._request.save_session, self._cache
        if name is None or cache is None or self._failure is not None:
            return None
        try:
            save_at_the_end(self._console, cache, self._plan, name)
        except HeadInferError as error:
            return error
        return None

    def _stats(self) -> "Stats":
        """Return what was measured; of a prefill that was cut short, the chunks that were run."""
        stats = self._offload.stats
        if stats.prefill_tokens or self._bar is None:
            return stats
        tokens, seconds = self._bar.done
        return replace(stats, prefill_tokens=self._settings.rows * tokens, prefill_s=seconds)

    def _print_summary(self) -> None:
        stats = self._stats()
        if stats.prefill_tokens:
            self._console.print()
            print_rows(self._console, summary_rows(stats, self._plan))
        if self._trace is not None:
            told = f"written to {self._request.trace}" if self._trace.written else "no decode step"
            self._console.print(f"trace: {told}", markup=False)

    def report_lost(self) -> int:
        """Tell that stdout did not take everything; a reader of text that has enough is no news.

        Returns:
            The exit code; 0 where it took all.
        """
        error = self._stdout_error
        if error is None:
            return 0
        if self._request.as_json or error.errno not in (errno.EPIPE, errno.EINVAL):
            what = "the JSON" if self._request.as_json else "all of the text"
            print_error(f"stdout did not take {what}: {error.strerror}")
        return EXIT_UNEXPECTED

    def _as_json(self, generation: "Generation") -> dict[str, Any]:
        return {
            "text": generation.text,
            "finish_reason": self._finish_reason(generation),
            "model": self._request.source.name,
            "load_in": self._request.source.load_in,
            "adapter": self._request.source.adapter,
            "assistant": self._request.assistant,
            "prompt_tokens": generation.prompt_tokens,
            "cached_tokens": self._cached_tokens,
            "new_tokens": len(generation.ids),
            "seed": self._request.seed,
            "plan": plan_as_json(self._plan),
            "stats": stats_as_json(self._stats()),
        }
