"""What verbs with methods check of the options of streaming heads, before anything is loaded."""

from collections.abc import Collection

from headinfer.cli.options import flag_of
from headinfer.errors import OptionError
from headinfer.estimate.methods import HEAD_WISE_SPARSE
from headinfer.plan.options import DECLARATIONS, Options
from headinfer.plan.shape import ModelShape
from headinfer.plan.streaming import STREAMING_OPTIONS, pattern_of


def check_streaming_heads(methods: Collection[str], settings: Options, shape: ModelShape) -> None:
    """Check that options of streaming heads are for a method that is run, and a pattern fits.

    Args:
        methods: names of those that are run.
        settings: of the run.
        shape: of the model.

    Raises:
        OptionError: no method heeds the options, or the pattern cannot be read or does not fit.
    """
    given = [
        name for name in STREAMING_OPTIONS if getattr(settings, name) != DECLARATIONS[name].default
    ]
    if given and HEAD_WISE_SPARSE not in methods:
        raise OptionError(
            f"{flag_of(given[0])} is heeded by the method {HEAD_WISE_SPARSE} alone; "
            "name it with --methods"
        )
    if settings.head_pattern is not None:
        pattern_of(settings.head_pattern, shape)
