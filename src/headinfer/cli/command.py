"""What the commands of all verbs have in common."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand


class OnceCommand(TyperCommand):
    """A command whose options are given once each, but for those that take several values.

    Without it the last of several would hold, and nothing be said of the others.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse options that are given again."""
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            for option, times in Counter(given).items():
                if times > 1 and _keeps_one(option):
                    ctx.fail(f"{'/'.join(option.opts)} is given {times} times, but one can hold")
        return super().parse_args(ctx, args)


def _keeps_one(option: Any) -> bool:
    """Whether an option would forget all values but the last; a flag says the same each time."""
    if option.param_type_name != "option" or option.multiple or option.count:
        return False
    return not option.is_flag or bool(option.secondary_opts)
