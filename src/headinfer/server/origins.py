"""Web pages of other origins that may call the server (CORS)."""

import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headinfer.errors import OptionError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s*]+")
"""What browsers send: a scheme, a host, and a port unless it is the scheme's own."""


def check_origins(given: Sequence[str]) -> tuple[str, ...]:
    """Return origins as browsers write them.

    Args:
        given: `https://name`, with a port where it has one; `*` for all pages there are.

    Raises:
        OptionError: one is no origin, and would never be met.
    """
    origins = tuple(origin.lower() for origin in given)
    for origin in origins:
        if origin != "*" and _ORIGIN.fullmatch(origin) is None:
            raise OptionError(
                f"--cors-origin {origin!r} is no origin; give a scheme, a name and a port without "
                "a path, as http://localhost:3000, or * for all pages"
            )
    return origins


def open_to(app: "ASGIApp", origins: Sequence[str]) -> "ASGIApp":
    """Return an application that tells browsers which pages may read its answers.

    Browsers ask with neither key nor body before they send a request. Such questions are answered
    here. They never send cookies of the server along.

    Args:
        app: that answers all else.
        origins: checked; none leave the application as it is.
    """
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    more: dict[str, Any] = {}
    if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
        more["allow_private_network"] = True  # else newer releases refuse pages of the internet
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
        **more,
    )
