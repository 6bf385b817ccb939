"""The model hub: whether it can be reached.

Its library tries a file that is not there six times, with pauses of 23 seconds in all. For whoever
has no network, or mistyped a name, that is long.
"""

import time

_PAUSE_S = 1.0
"""Before the hub is asked again: the name of a host may be found late."""

_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError")
"""Errors of the HTTP libraries that the hub's library used so far."""


def check_reachable(name: str, file: str = "config.json") -> None:
    """Find out whether the hub can be asked for what is not among the local files.

    What it answers, a refusal too, is left to whoever loads the model.

    Args:
        name: the id of a model, or of an adapter.
        file: that it begins with.

    Raises:
        ConnectionError: there is no connection to the hub, also not a second later.
    """
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_url,
        try_to_load_from_cache,
    )

    if constants.HF_HUB_OFFLINE:
        return
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        url = hf_hub_url(name, file)
    except ValueError:  # it is no id, and transformers says why
        return
    for pause_s in (_PAUSE_S, 0.0):
        try:
            get_hf_file_metadata(url)
            return
        except Exception as error:
            if type(error).__name__ not in _UNREACHABLE:
                return
            last = error
        time.sleep(pause_s)
    raise ConnectionError("the model hub cannot be connected to") from last
