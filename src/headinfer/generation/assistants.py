"""A smaller model that drafts for another one: as a user names it, loaded beside the other."""

import os

from transformers import PreTrainedModel

from headinfer.errors import OptionError
from headinfer.generation.model import ModelSource, load_config, load_model


def check_assistant(given: object) -> ModelSource | PreTrainedModel | None:
    """Return an assistant as it was given: loaded, where it comes from, or none.

    Raises:
        OptionError: it is something else.
    """
    if given is None or isinstance(given, PreTrainedModel):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"assistant must be a folder, an id or a loaded model, not {given!r}")
    return ModelSource(name=os.fspath(given))


def load_assistant(
    assistant: ModelSource | PreTrainedModel | None, model: PreTrainedModel
) -> PreTrainedModel | None:
    """Return an assistant, loaded where a model is and in its dtype unless it is loaded already.

    Args:
        assistant: loaded, where it comes from, or none.
        model: that it drafts for.

    Raises:
        ModelLoadError: it cannot be loaded.
    """
    if not isinstance(assistant, ModelSource):
        return assistant
    dtype = str(model.dtype).removeprefix("torch.")
    loaded: PreTrainedModel
    config = load_config(assistant)
    loaded, _ = load_model(assistant, config, dtype=dtype, device=model.device.type)
    return loaded
