"""What the commands of all verbs have in common."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand

from headinfer.cli.usage import told
from headinfer.errors import OptionError


class OnceCommand(TyperCommand):
    """A command whose options are given once each, but for those that take several values.

    Without it the last of several would hold, and nothing be said of the others.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that are given again, and values that are of another kind.

        Raises:
            OptionError: says which option, and why.
        """
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        written: dict[str, Any] = {}
        try:
            written, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(given).items():
                if times > 1 and _keeps_one(option):
                    ctx.fail(f"{'/'.join(option.opts)} is given {times} times, but one can hold")
            return super().parse_args(ctx, args)
        except Exception as error:
            # Older typer raises click's exceptions, newer ones its own: both have this method.
            if not hasattr(error, "format_message"):
                raise
            raise OptionError(f"{told(error, written)} (--help lists the options)") from error


def _keeps_one(option: Any) -> bool:
    """Whether an option would forget all values but the last; a flag says the same each time."""
    if option.param_type_name != "option" or option.multiple or option.count:
        return False
    return not option.is_flag or bool(option.secondary_opts)
