"""From which web pages requests are taken: what browsers say of them in `Origin` and `Host`.

A page of the internet can send requests to servers of the machine that shows it. They cost minutes,
whether or not the page may read the answers. A page's own name may also be made to lead to that
machine (DNS rebinding). Browsers then take the server for the page's own.
"""

import ipaddress
import re
from collections.abc import Sequence

from starlette.datastructures import Headers

from headinfer.server.problems import ProblemError

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d*)?")
"""A name, a number or an IPv6 number in brackets, and maybe a port."""

_MOST_TOLD = 100


def is_loopback(host: str) -> bool:
    """Whether a name or number is that of this machine, which no other one reaches.

    Args:
        host: without port and brackets, in small letters.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Callers:
    """A rule of which requests are taken, by the web page that sent them.

    Starlette's `TrustedHostMiddleware` compares `Host` with a list, too. Its refusals are not in
    the API's form, and its older releases do not know the brackets of IPv6.

    Args:
        origins: of other web pages that may call, checked; `*` for all.
        own_hosts: what the server may be called beside loopback names and the hosts of `origins`;
            None for anything, as where other machines reach it.
    """

    def __init__(self, origins: Sequence[str], own_hosts: Sequence[str] | None) -> None:
        self._origins = frozenset(origins)
        self._hosts: frozenset[str] | None = None
        if own_hosts is not None and "*" not in origins:
            names = (_host_of(_place_of(origin)) for origin in origins)
            self._hosts = frozenset([*(name.lower() for name in own_hosts), *names])

    def refusal(self, headers: Headers) -> ProblemError | None:
        """Return why a request is refused, or None.

        A request without `Origin` comes from no page of another origin, or cannot change anything.

        Args:
            headers: of the request.
        """
        host = headers.get("host", "").lower()
        name = _host_of(host)
        if host and self._hosts is not None and not (name in self._hosts or is_loopback(name)):
            return _refusal(
                f"this server is not called {host[:_MOST_TOLD]!r}; call it localhost, or start it "
                "with --cors-origin SCHEME://NAME where a proxy calls it so"
            )
        origin = headers.get("origin", "").lower()
        # A proxy that brings TLS has another scheme than this server, and the same name.
        own = bool(host) and _place_of(origin) == host
        if origin and not own and not self._origins & {origin, "*"}:
            return _refusal(
                f"web pages of {origin[:_MOST_TOLD]!r} may not call this server; start it with "
                "--cors-origin ORIGIN if they may"
            )
        return None


def _place_of(origin: str) -> str:
    """Return an origin's host, with the port where it has one."""
    return origin.partition("://")[2]


def _host_of(place: str) -> str:
    """Return a host without port and brackets; nothing where it is none."""
    match = _HOST.fullmatch(place)
    return "" if match is None else match[1] or match[2]


def _refusal(message: str) -> ProblemError:
    return ProblemError(403, message)
