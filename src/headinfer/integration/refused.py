"""Decode steps that are not captured, in one form or in any; the log says why, once."""

import contextlib
import logging
from collections.abc import Hashable, Iterator

from headinfer.device.base import CaptureError, PlaceError
from headinfer.device.hazards import HazardError
from headinfer.engine.ready import Form
from headinfer.errors import is_out_of_memory
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.decode_call import DecodeCall
from headinfer.integration.said import SaidOnce, first_line

_logger = logging.getLogger(__name__)


class RefusedCalls:
    """A set of the calls that are not captured any more.

    Args:
        aloud: whether to warn of what holds for a whole model. The CPU loses little by it.

    Attributes:
        keys: of these calls.
    """

    def __init__(self, *, aloud: bool = True) -> None:
        self.keys: set[Hashable] = set()
        self._level = logging.WARNING if aloud else logging.INFO
        self._log = SaidOnce(_logger)

    def in_all_forms(self, call: DecodeCall) -> bool:
        """Whether no form of a call is left."""
        return self.keys.issuperset((call.kind, form) for form in Form)

    def refuse(self, call: DecodeCall, reason: str) -> None:
        """Capture no such call any more, in whatever form, and say so once.

        One that streams is left the form in pieces, which is worth most of it.
        """
        if call.form is Form.STREAMED:
            self.keys.add(call.key)
            _logger.info("decode steps are replayed in pieces: %s", reason)
            return
        self.keys.update((call.kind, form) for form in Form)
        self.say(reason, call.new_tokens)

    def refuse_for_its_bits(self, call: DecodeCall) -> None:
        """Capture no such call any more: it gave other bits than what was launched."""
        self.refuse(call, "captured, they give other bits")

    @contextlib.contextmanager
    def attempt(
        self, cache: OffloadedCache, call: DecodeCall, *, awaited: bool = False
    ) -> Iterator[None]:
        """Refuse a call from now on where the `with` statement fails, and go on behind it.

        Who then launches the step kernel by kernel meets what is wrong with the call itself.

        Args:
            cache: the call's.
            call: what is attempted.
            awaited: whether other ranks wait in the midst of it for this one. Then only what all of
                them meet alike is not raised: that the step cannot be captured.
        """
        try:
            yield
        except HazardError:  # a defect of ours, which no other form is to hide
            raise
        except Exception as error:
            if awaited and not isinstance(error, CaptureError):
                raise
            reason = first_line(error)
            if is_out_of_memory(error):
                reason = "there is no GPU memory left for a capture"
            if isinstance(error, PlaceError):
                self.keys.add(call.key)  # the other form is left
            else:
                self.refuse(call, reason)
        finally:
            cache.state.functions.forget_pending()

    def say(self, reason: str, new_tokens: int = 1) -> None:
        """Say once why decode steps are not captured, or passes of several tokens."""
        if new_tokens > 1:
            self._log.say(
                *(logging.INFO, f"passes: {reason}"),
                *("passes of %s tokens are launched kernel by kernel: %s", new_tokens, reason),
            )
            return
        self._log.say(
            *(self._level, "refused"),
            "decode steps of this model are launched kernel by kernel: %s; capture=False spares "
            "the attempt",
            reason,
        )

    def say_of_model(self, reason: str) -> None:
        """Say once why no decode step of the model can be captured, which nobody attempts."""
        self._log.say(
            *(self._level, reason),
            *("decode steps of this model are launched kernel by kernel: %s", reason),
        )

    def say_for_now(self, reason: str) -> None:
        """Say once for each reason why such decode steps are not captured."""
        self._log.say(
            *(logging.INFO, reason),
            *("decode steps are launched kernel by kernel while %s", reason),
        )
