"""Which calls come again with as many new tokens, so that a capture of one may serve others."""

import weakref
from collections.abc import Mapping
from typing import Any

from headinfer.engine.parted import CacheEngine
from headinfer.integration.decode_call import verifies
from headinfer.integration.drafting import DraftableCache
from headinfer.schedule.route import MAX_ASKED_TOKENS


class RepeatedCalls:
    """A record of how many new tokens the last call of each cache had.

    Drafts are apart from other calls: they come between passes that verify them.

    Args:
        several: whether calls of several new tokens are to be captured.
    """

    def __init__(self, *, several: bool) -> None:
        self._several = several
        self._calls: weakref.WeakKeyDictionary[CacheEngine, int] = weakref.WeakKeyDictionary()
        self._drafts: weakref.WeakKeyDictionary[CacheEngine, int] = weakref.WeakKeyDictionary()

    def is_new(self, engine: CacheEngine, new_tokens: int) -> bool:
        """Whether a cache's last call had another number of tokens, or was no step."""
        return self._of(engine).get(engine) != new_tokens

    def may_capture(
        self,
        engine: CacheEngine,
        cache: DraftableCache,
        arguments: Mapping[str, Any],
        new_tokens: int,
    ) -> bool:
        """Whether a call may be captured: one token, or a few to verify, as at the last time.

        Args:
            engine: of the cache.
            cache: of the call.
            arguments: of the call, by name.
            new_tokens: of each row.
        """
        if new_tokens == 1:
            return True
        if not (self._several and cache.verifies and verifies(arguments)):
            return False
        if new_tokens > MAX_ASKED_TOKENS:
            return False
        known = any(each.new_tokens == new_tokens for each in engine.captured.values())
        return known or not self.is_new(engine, new_tokens)

    def note(self, engine: CacheEngine, new_tokens: int) -> None:
        """Note a call."""
        self._of(engine)[engine] = new_tokens

    def note_launched(self, engine: CacheEngine, new_tokens: int) -> None:
        """Note a call that is launched: no step is like it where it had one token."""
        calls = self._of(engine)
        calls.pop(engine, None)
        if new_tokens > 1:
            calls[engine] = new_tokens

    def _of(self, engine: CacheEngine) -> "weakref.WeakKeyDictionary[CacheEngine, int]":
        return self._drafts if engine.drafting else self._calls
