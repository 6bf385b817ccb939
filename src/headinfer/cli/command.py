"""What the commands of all verbs have in common."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperGroup

from headinfer.cli.options import (
    GENERATION_PANEL,
    MEMORY_PANEL,
    MODEL_PANEL,
    NO_VALUE,
    OUTPUT_PANEL,
    RESEARCH_PANEL,
)
from headinfer.cli.usage import told

_PANEL = "rich_help_panel"

_OWN_PANELS = {
    "plan": OUTPUT_PANEL,
    "probe": "Measurement",
    "roofline": "Roofs",
    "heads": "Pattern",
    "demo": "Document",
    **dict.fromkeys(("decode", "prefill", "memory", "max-context", "ablation"), "Measurement"),
}
"""Panels of what is a verb's alone; of all others it is the task."""

_ORDER = (MODEL_PANEL, GENERATION_PANEL, OUTPUT_PANEL, MEMORY_PANEL, RESEARCH_PANEL)
"""Panels by who needs them, after the prompt or the verb's own."""


def _plain_help(option: Any) -> Any:
    """Return the option `--help` as all other flags look, or None for none."""
    if option is not None:
        option.metavar = NO_VALUE
    return option


_NO_VERB = "headinfer.no_verb"
"""What a context knows of a word that is no verb."""


class Group(TyperGroup):
    """A group of verbs.

    A word that is no verb has an error of its own in newer releases of click, and not in typer.
    So the context notes it, for `names_no_verb`.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the verb that arguments begin with, and what is behind it."""
        if not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.meta[_NO_VERB] = True
        return super().resolve_command(ctx, args)

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`."""
        return _plain_help(super().get_help_option(ctx))


def names_no_verb(error: Exception) -> bool:
    """Whether wrong usage is a word that is no verb.

    Args:
        error: of Typer or click.
    """
    context = getattr(error, "ctx", None)
    return context is not None and _NO_VERB in context.meta


class OnceCommand(TyperCommand):
    """A command whose options are given once each, but for those that take several values.

    Without it the last of several would hold, and nothing be said of the others.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option `--help`."""
        return _plain_help(super().get_help_option(ctx))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters by panels that all have a name, in the order of who needs them."""
        parameters: list[Any] = super().get_params(ctx)
        own = _OWN_PANELS.get(self.name or "", "Task")
        for each in parameters:
            # Older releases of typer have an option `--help` of click's, which has no panel.
            if each.param_type_name == "option" and getattr(each, _PANEL, None) is None:
                each.rich_help_panel = OUTPUT_PANEL if "--help" in each.opts else own
        return sorted(parameters, key=_rank)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that are given again, and values that are of another kind.

        Raises:
            Exception: of typer or click; says which option, and why.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        written: dict[str, Any] = {}
        try:
            written, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(given).items():
                if times > 1 and _keeps_one(option):
                    ctx.fail(f"{'/'.join(option.opts)} is given {times} times, but one can hold")
            rest = super().parse_args(ctx, args)
            for option in self.params:  # which the oldest typer with the newest click does not see
                if option.required and ctx.params.get(option.name or "") in (None, ()):
                    names = " / ".join(f"{name!r}" for name in option.opts)
                    ctx.fail(f"Missing {option.param_type_name} {names}")
            return rest
        except Exception as error:
            # Older typer raises click's exceptions, newer ones its own: both have this method.
            if not hasattr(error, "format_message"):
                raise
            words = told(error, written)
        ctx.fail(words)
        raise AssertionError("`fail` raises")


def _rank(parameter: Any) -> int:
    panel = getattr(parameter, _PANEL, None)
    return _ORDER.index(panel) if panel in _ORDER else -1


def _keeps_one(option: Any) -> bool:
    """Whether an option would forget all values but the last; a flag says the same each time."""
    if option.param_type_name != "option" or option.multiple or option.count:
        return False
    return not option.is_flag or bool(option.secondary_opts)
