"""The handle on an attached model."""

import os
from types import TracebackType

from headinfer.engine.stats import Stats
from headinfer.integration.cache import OffloadedCache
from headinfer.plan.plan import Plan
from headinfer.session import Session
from headinfer.units import parse_tokens


class Offload:
    """A handle on one attached model, until `detach`; made by `attach`.

    A context manager that detaches, also after an exception. Several threads may use the model,
    each with caches of its own: their calls take turns, first come first served.

    Attributes:
        session: what plans and serves the model's caches; no part of the stable interface.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def plan(self) -> Plan:
        """What was chosen for one row; each cache has a plan for its own rows and length."""
        return self.session.plan

    @property
    def stats(self) -> Stats:
        """What was measured since the attachment; goes on counting."""
        return self.session.stats

    def new_cache(self, max_tokens: int | str | None = None) -> OffloadedCache:
        """Return an empty cache to pass to `generate` or the model.

        It is passed as `past_key_values` or, since transformers 5.24, as `cache`. With any release
        `model.generate(**inputs, **cache.as_keyword())` is right.

        It may be used again for the next turn of the same conversation. Its memory is freed when it
        is closed or no longer referred to.

        Args:
            max_tokens: tokens to reserve CPU memory for, prompt and answer together. By default
                each prompt reserves what it needs, and more follows in small segments.

        Raises:
            CacheStateError: the model was detached.
        """
        return self.session.new_cache(
            None if max_tokens is None else parse_tokens(max_tokens, "max_tokens")
        )

    def load_cache(
        self,
        path: str | os.PathLike[str],
        max_tokens: int | str | None = None,
        *,
        partial: bool = False,
    ) -> OffloadedCache:
        """Return a cache with all that `OffloadedCache.save` wrote, of the same model.

        The options of the attachment may be others than they were: device, tiles, memory.

        Args:
            path: of the session, a folder.
            max_tokens: tokens to reserve CPU memory for, those of the session included.
            partial: whether a session that is damaged gives the tokens before that place, with a
                warning in the log. By default it is refused.

        Raises:
            SessionFileError: there is no session, it is of another model, or is damaged. The
                message says how, and how many tokens can be used.
            MemoryPlanError: the GPU memory or the CPU memory is too small for it.
            CacheStateError: the model was detached.
        """
        most = None if max_tokens is None else parse_tokens(max_tokens, "max_tokens")
        return self.session.load_cache(path, most, partial=partial)

    def __repr__(self) -> str:
        """Return the model and what its caches hold in one line, without waiting for a call."""
        return f"{type(self).__name__}({self.session.described()})"

    def detach(self) -> None:
        """Leave the model exactly as it was; its caches are closed. May be called again.

        Waits for the call of another thread.

        Raises:
            CacheStateError: called from within a call of the model.
        """
        self.session.detach()

    def __enter__(self) -> "Offload":
        """Return itself."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Detach."""
        self.detach()
