"""The process of a server: listening while the model loads, and ending in time."""

import asyncio
import contextlib
import copy
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import FrameType

import uvicorn

from headinfer.errors import OptionError
from headinfer.server.app import make_app
from headinfer.server.callers import is_loopback
from headinfer.server.served import Phase, Served, Service

CLOSING_S = 20.0
"""Seconds that closing the desk may take."""

_STREAMS_S = 5
"""Seconds after the desk is closed in which connections that are still open are cut off."""

_IDLE_S = 75
"""Seconds that an idle connection stays open.

Proxies and clients keep theirs for less, so none sends a request into one that is just closed."""

_END_S = 28.0
"""Seconds after a signal in which the process has ended, whatever still runs."""

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address to listen on.

    Attributes:
        host: a name or number.
        port: 0 for one that is free.
    """

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host.lower())

    def listen(self) -> socket.socket:
        """Return a socket that listens.

        Raises:
            OptionError: there is no such address, or it is taken.
        """
        place = f"{self.host}:{self.port}"
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            listening = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise OptionError(f"there is no address {place} ({error.strerror})") from error
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.host, self.port))
            listening.listen(1024)
        except OSError as error:
            listening.close()
            raise OptionError(
                f"the address {place} cannot be had ({error.strerror}); give another --port, or 0"
            ) from error
        return listening

    def url(self, listening: socket.socket) -> str:
        """Return what a browser is given for a socket that listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{listening.getsockname()[1]}"


class _Server(uvicorn.Server):
    """A server that ends by our rules.

    Args:
        config: of uvicorn.
        service: told to close when a signal comes.
        on_signal: told the name of a signal that ends it.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, on_signal: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take the signals over; the process ends with a code of its own and not with theirs."""
        before = {}
        for name in _SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End, at a second signal at once."""
        if self._service.phase is Phase.CLOSING:
            os._exit(128 + sig)
        late = threading.Timer(_END_S, _end_at_once)
        late.daemon = True
        late.start()
        self.stop(signal.Signals(sig).name)

    def stop(self, signal_name: str | None = None) -> None:
        """End: refuse new requests, end those that run, and keep what they read.

        The address listens until that is done, so that who asks meanwhile is told.

        Args:
            signal_name: of the signal that ends it, if one does.
        """
        self._service.begin_closing()

        def close() -> None:  # in a thread, as no handler of signals may write or wait
            try:
                if signal_name is not None:
                    self._on_signal(signal_name)
                self._service.close(CLOSING_S)
            finally:
                self.should_exit = True

        threading.Thread(target=close, daemon=True).start()


def _end_at_once() -> None:
    sys.stderr.write("headinfer: a chunk still runs; ending without it\n")
    sys.stderr.flush()
    os._exit(1)


def serve(
    service: Service,
    address: Address,
    load: Callable[[], Served],
    *,
    keys: Sequence[str],
    origins: Sequence[str],
    debug: bool,
    verbose: bool,
    on_listening: Callable[[str], None],
    on_ready: Callable[[], None],
    on_signal: Callable[[str], None],
) -> None:
    """Serve until a signal comes.

    Args:
        service: not ready yet.
        address: to listen on.
        load: returns the model; called in a thread of its own.
        keys: of which each request must bring one.
        origins: of other web pages that may call the server.
        debug: whether stderr has the whole of errors that nobody foresaw.
        verbose: whether each request is logged, by its path and status.
        on_listening: told the URL.
        on_ready: called once the model is loaded.
        on_signal: told the name of a signal that ends the server.

    Raises:
        HeadInferError: the address cannot be had, or the model cannot be loaded.
    """
    listening = address.listen()
    logging = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    logging["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config = uvicorn.Config(
        make_app(
            service,
            keys=keys,
            origins=origins,
            own_hosts=(address.host,) if is_loopback(listening.getsockname()[0]) else None,
            debug=debug,
        ),
        log_config=logging,
        log_level="info" if verbose else "warning",
        access_log=verbose,
        server_header=False,
        timeout_graceful_shutdown=_STREAMS_S,
        timeout_keep_alive=_IDLE_S,
        ws="none",
        lifespan="off",
    )
    server = _Server(config, service, on_signal)
    failure: list[BaseException] = []

    def loading() -> None:
        try:
            served = load()
            if service.ready(served):
                on_ready()
            else:
                served.desk.close(timeout_s=CLOSING_S)
        except BaseException as error:
            failure.append(error)
            server.stop()

    thread = threading.Thread(target=loading, name="headinfer-load", daemon=True)
    ended = False
    with server.capture_signals():  # before the address is told, as whoever reads it may end us
        on_listening(address.url(listening))
        thread.start()
        try:
            asyncio.run(server.serve([listening]))
        finally:
            ended = service.close(CLOSING_S)
    if failure:
        raise failure[0]
    if thread.is_alive() or not ended:
        # The interpreter's end would take modules apart under a thread that imports them, and
        # would abort the process at a thread in the model.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
