"""A smaller model that drafts for another one: as a user names it, loaded beside the other."""

import os

from transformers import PreTrainedModel

from headinfer.errors import OptionError
from headinfer.generation.model import ModelSource, load_config, load_model


def check_assistant(given: object) -> str | PreTrainedModel | None:
    """Return an assistant as it was given: loaded, by its name, or none.

    Raises:
        OptionError: it is something else.
    """
    if given is None or isinstance(given, PreTrainedModel):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"assistant must be a folder, an id or a loaded model, not {given!r}")
    return os.fspath(given)


def load_assistant(
    assistant: str | PreTrainedModel | None,
    model: PreTrainedModel,
    *,
    local_files_only: bool = False,
) -> PreTrainedModel | None:
    """Return an assistant, loaded where a model is and in its dtype unless it is loaded already.

    Args:
        assistant: loaded, by its name, or none.
        model: that it drafts for.
        local_files_only: never ask the hub.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    if not isinstance(assistant, str):
        return assistant
    source = ModelSource(name=assistant, local_files_only=local_files_only)
    dtype = str(model.dtype).removeprefix("torch.")
    loaded: PreTrainedModel
    loaded, _ = load_model(source, load_config(source), dtype=dtype, device=model.device.type)
    return loaded
