"""The console script: imports the verbs where Ctrl-C is no traceback."""

import signal
import sys


def run() -> None:
    """Run the command line; what the console script calls."""
    try:
        from headinfer.cli.main import run as run_verbs

        run_verbs()
    except KeyboardInterrupt:  # outside of a verb, which would have told of it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.stderr is not None:
            sys.stderr.write("headinfer: interrupted\n")
        sys.exit(128 + signal.SIGINT)
