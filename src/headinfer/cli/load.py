"""What the command line does before a model is loaded, and the models it knows by name."""

import logging
import os
import warnings
from typing import Any

from rich.console import Console

from headinfer.cli.stages import LOADING_S, Stages
from headinfer.errors import OptionError
from headinfer.estimate.presets import PRESETS
from headinfer.generation.model import ModelSource, load_config
from headinfer.gguf_models.folder import check_packaged, is_gguf_model
from headinfer.units import counted_tokens

DEMO_MODEL = "demo"

_SHOWN = 50
"""Characters of a name in a line that is drawn anew."""


class NamedSource(ModelSource):
    """A model as the command line names it: the embedded one too."""

    __slots__ = ()

    def location(self) -> str:
        """Return the folder or hub id; the demo model is built if need be.

        Raises:
            ModelLoadError: the name can be neither.
        """
        if self.name == DEMO_MODEL:
            from headinfer.demo import ensure_model

            return str(ensure_model())
        return ModelSource.location(self)

    def known_names(self) -> tuple[str, ...]:
        """Return names of models that are not of the hub: the embedded one too."""
        return (DEMO_MODEL, *ModelSource.known_names(self))


def check_trained(name: str) -> None:
    """Check that a name is no preset, before the hub is asked for it.

    Raises:
        OptionError: it is one, which has no weights.
    """
    if name in PRESETS:
        raise OptionError(f"{name} is a shape without weights; give a folder or hub id")


def check_model(console: Console, source: ModelSource) -> None:
    """Refuse a model that is not there, before a server takes an address for it.

    Args:
        console: on stderr; told where the hub takes its time.
        source: of which no weights are read. A model in GGUF is not unpacked.

    Raises:
        ModelLoadError: there is no such model; names one that is called alike.
    """
    if source.name == DEMO_MODEL:
        return
    if is_gguf_model(source.name):
        check_packaged(source.name, source.unpacked_dtype)
        return
    with Stages(console) as stages:
        begin_loading(stages, source)
        load_config(source)


def share_cores() -> None:
    """Let torch's idle CPU threads sleep, not spin; to be called before torch is imported.

    Where two threads share two cores with other processes, spinning made the demo 3 to 8 times
    slower. An `OMP_WAIT_POLICY` the user set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def prepare_cpu(threads: int | None = None) -> None:
    """Set torch's CPU threads, which our kernels use too, and let numbers below 1e-38 be 0.

    Must be called before torch computes anything, for its threads inherit this. Some processors
    take a hundred times as long for such numbers, which softmax makes: the demo took over ten
    minutes, not one.

    Args:
        threads: how many; None to leave it to torch.
    """
    import torch

    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def calm_transformers(*, verbose: bool) -> None:
    """Silence what transformers and the hub print beside results, unless `verbose`."""
    if verbose:
        return
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; else bars of GGUF stay
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for library in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def begin_loading(stages: Stages, source: ModelSource) -> None:
    """Show that a model's files are looked for and read."""
    name = source.name
    if len(name) > _SHOWN:
        name = f"...{name[-_SHOWN:]}"
    known = name == DEMO_MODEL or is_gguf_model(source.name)
    if known or os.path.exists(os.path.expanduser(source.name)) or source.local_files_only:
        stages.begin(f"loading {name}", quiet_s=LOADING_S)
    else:
        stages.begin(f"fetching {name} from the model hub, or loading it")


def max_positions(config: Any) -> int:
    """Return the positions a model was made for; 0 when its config does not say."""
    text_config = config.get_text_config(decoder=True)
    return int(getattr(text_config, "max_position_embeddings", 0) or 0)


def beyond_positions(config: Any, tokens: int) -> str:
    """Return a note for the user where a context is longer than a model was made for; else ""."""
    positions = max_positions(config)
    if positions and tokens > positions:
        return f"the model was made for {counted_tokens(positions, 'position')}"
    return ""
