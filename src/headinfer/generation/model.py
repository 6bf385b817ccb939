"""Loading config, tokenizer and weights, with every failure told in one line."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headinfer.errors import (
    HeadInferError,
    ModelLoadError,
    OptionError,
    is_bug,
    is_out_of_memory,
    reason_of,
)
from headinfer.generation.adapter import AdapterSource
from headinfer.generation.gpus import Gpus
from headinfer.generation.hub import check_reachable
from headinfer.generation.meant import did_you_mean
from headinfer.generation.quantised import (
    check_installed,
    check_library,
    check_packable,
    check_quantisable,
    quantisation,
    quantised_by,
)
from headinfer.gguf_models import UNPACKED_DTYPE, is_gguf_model, model_folder
from headinfer.gguf_models.packaged import PACKAGED

_DECODERS_WITHOUT_FLAG = ("gpt_neox", "gpt_neox_japanese")
"""Their configs have `is_decoder=False` by default, as encoders' have, and mean nothing by it."""

_LONGEST_ID = 200
"""Characters: a hub allows 96, and an owner before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A source of a model: where it comes from and how it is to be loaded.

    Attributes:
        name: as the user gave it.
        local_files_only: never ask the hub.
        trust_remote_code: run code that comes with the model.
        load_in: one of `LOAD_IN` to quantise its weights as they are loaded; None for as they are.
        adapter: a LoRA to put on it: a folder or the id of one.
        unpacked_dtype: that weights in GGUF are unpacked to, a torch dtype's name.
        gpus: to spread its layers over; None for one device.
    """

    name: str
    local_files_only: bool = False
    trust_remote_code: bool = False
    load_in: str | None = None
    adapter: str | None = None
    unpacked_dtype: str = UNPACKED_DTYPE
    gpus: Gpus | None = None

    def location(self) -> str:
        """Return the folder or hub id; a model in GGUF is unpacked if need be.

        Raises:
            ModelLoadError: the name can be neither, or what it names cannot be unpacked.
        """
        if is_gguf_model(self.name):
            return str(model_folder(self.name, self.unpacked_dtype))
        folder = os.path.expanduser(self.name)
        # Functions of os.path and not of Path: those raise for names that are too long.
        if os.path.isdir(folder):
            return self._checked(Path(folder))
        if os.path.isfile(folder):
            raise ModelLoadError(
                f"model {self.name!r} is a file; give a folder with config.json and safetensors "
                "files, or a .gguf file"
            )
        looks_like_path = self.name.startswith(("/", "./", "../", "~")) or self.name.count("/") > 1
        blank = not self.name.strip() or not self.name.isprintable()
        if looks_like_path or blank or os.path.exists(folder) or len(self.name) > _LONGEST_ID:
            raise ModelLoadError(
                f"model {self.name!r} is neither a folder nor a model id, such as 'Qwen/Qwen3-8B'"
            )
        return self.name

    def known_names(self) -> tuple[str, ...]:
        """Return names of models that are not of the hub, for whoever mistypes one."""
        return tuple(PACKAGED)

    @property
    def adapter_source(self) -> AdapterSource | None:
        """Where its adapter comes from; None without one."""
        if self.adapter is None:
            return None
        return AdapterSource(name=self.adapter, local_files_only=self.local_files_only)

    def _checked(self, folder: Path) -> str:
        """Return a folder that holds a model."""
        try:
            os.listdir(folder)
        except OSError as error:
            raise ModelLoadError(
                f"folder {self.name!r} may not be read ({error.strerror}); change its permissions"
            ) from error
        if not (folder / "config.json").is_file():
            gguf = min(folder.glob("*.gguf"), default=None)
            instead = f"; give the GGUF file itself, as {gguf}" if gguf else ""
            raise ModelLoadError(
                f"folder {self.name!r} holds no model: no config.json in it{instead}"
            )
        return str(folder)

    def keywords(self) -> dict[str, Any]:
        """Return keywords for every `from_pretrained`."""
        return {
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }


def choose_device(name: str) -> str:
    """Return the device for a model that is still to be loaded: "cpu", "cuda" or "simulated".

    Args:
        name: one of those, or "auto".

    Raises:
        OptionError: CUDA was asked for and there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device=cuda, but CUDA is not available here; use device=cpu")
    return name


def load_config(source: ModelSource) -> Any:
    """Return a model's config, and refuse at once what is not a causal language model.

    Raises:
        ModelLoadError: there is no such model, it is of another kind, its config is wrong, or it
            cannot be had in the form asked for.
    """
    from transformers import AutoConfig

    from headinfer.generation.config_check import check_config

    if source.load_in is not None:
        check_library(source.load_in)
    if source.adapter_source is not None:
        source.adapter_source.read_config()
    location = source.location()
    if Path(location).is_dir():
        check_config(source.name, location)
    try:
        if not source.local_files_only and not Path(location).is_dir():
            check_reachable(location)
        config = AutoConfig.from_pretrained(location, **source.keywords())
    except Exception as error:
        raise _load_error(source, "model", error) from error
    check_config(source.name, location)  # of a hub, once it is here
    check_causal(source, config)
    if source.load_in is not None:
        check_quantisable(source.name, source.load_in, config)
    return config


def check_causal(source: ModelSource, config: Any) -> None:
    """Refuse a transformers config of another kind than a causal language model's.

    Raises:
        ModelLoadError: says which kind it is of.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if source.trust_remote_code and getattr(config, "auto_map", None):
        return
    architectures = list(config.architectures or ())
    kind = ", ".join(architectures) or config.model_type
    refusal = f"model {source.name!r} ({kind}) is not a causal language model"
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{refusal} but an encoder-decoder; only decoders are served")
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelLoadError(f"{refusal} that transformers can load")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and not any(
        name in causal or name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures
    ):
        raise ModelLoadError(refusal)
    encoder = getattr(config, "is_decoder", True) is False
    if encoder and config.model_type not in _DECODERS_WITHOUT_FLAG:
        raise ModelLoadError(f"{refusal} but an encoder (is_decoder is false in its config)")


def load_tokenizer(source: ModelSource) -> Any:
    """Return a model's tokenizer.

    Raises:
        ModelLoadError: it has none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.location(), **source.keywords())
    except Exception as error:
        raise _load_error(source, "tokenizer of model", error) from error


def load_model(
    source: ModelSource, config: Any, *, dtype: str, device: str, split: bool = False
) -> tuple[Any, str | None]:
    """Return a model in eval mode, on CUDA if the device is that, else on the CPU; and a note.

    Args:
        source: where from.
        config: from `load_config`.
        dtype: "auto" or a torch dtype's name.
        device: from `choose_device`.
        split: whether this is one of several ranks, each of which loads its part.

    Returns:
        The model, and what the user should know about its checkpoint, if anything.

    Raises:
        ModelLoadError: its weights cannot be loaded, or are not all there.
    """
    from headinfer.generation.config_check import check_generation_config
    from headinfer.integration.checkpoint import load_checkpoint

    check_installed(source.name, config)
    check_generation_config(source.name, source.location())
    keywords = source.keywords() | {"config": config, "dtype": dtype}
    place = "cuda" if device == "cuda" else "cpu"
    if source.load_in is not None:
        keywords["quantization_config"] = quantisation(source.load_in, config, dtype)
    if source.load_in is not None or (quantised_by(config) and place == "cuda"):
        # Quantised weights are made where they stay.
        keywords["device_map"] = {"": 0 if place == "cuda" else place}
    if split:
        from transformers.distributed import DistributedConfig

        keywords["distributed_config"] = DistributedConfig(tp_plan="auto")
    try:
        if source.gpus is not None:
            keywords |= source.gpus.keywords(
                config,
                dtype,
                keywords.get("quantization_config"),
                trust_remote_code=source.trust_remote_code,
            )
        model, note = load_checkpoint(source.name, source.location(), **keywords)
        if source.load_in is not None:
            check_packable(source.name, model)
        if source.adapter_source is not None:
            source.adapter_source.add_to(model, source.name)
        if source.gpus is None and model.device.type != place:  # some in 8 bits refuse even to stay
            model.to(place)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise _load_error(source, "model", error) from error
    return model.eval(), note


def _load_error(source: ModelSource, what: str, error: Exception) -> HeadInferError:
    """Turn transformers' explanations, several lines with links, into one line.

    Raises:
        ModelLoadError: one of the model's files cannot be read at all.
    """
    from headinfer.generation.config_check import check_files

    if isinstance(error, HeadInferError):
        return error
    location = source.location()
    folder = Path(location).is_dir()
    check_files(source.name, location)
    reason, asked = reason_of(error), ""
    offline = source.local_files_only or os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    if isinstance(error, OSError) and not folder:
        question = did_you_mean(source.name, source.known_names())
        asked = f"; {question}" if question else ""
        if offline:
            reason = "it is not among the local files; give a folder, or allow downloads"
        elif "connect" in reason:
            reason = "it is not among the local files, and the model hub cannot be reached"
    elif (field := re.match(r"Validation error for field '(\w+)'", str(error))) is not None:
        reason = (
            f"{field[1]} in its config.json has a value of a kind that transformers does not take; "
            "correct it, or fetch the file again"
        )
    elif is_bug(error):
        import transformers

        reason = (
            f"transformers {transformers.__version__} stops with {reason}; correct its config.json "
            "and tokenizer files, or fetch them again"
        )
    return ModelLoadError(f"{what} {source.name!r} cannot be loaded: {reason}{asked}")
