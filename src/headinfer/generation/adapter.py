"""Low-rank adapters (LoRA) on a loaded model, put there by peft.

Adapters are not merged into the weights: in 16 bits that would round them, and quantised weights
cannot take them at all. So the model computes what peft's own does.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from headinfer.errors import ModelLoadError, is_out_of_memory
from headinfer.generation.hub import check_reachable
from headinfer.units import counted

_NAMED = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """A source of an adapter.

    Attributes:
        name: as the user gave it: a folder, or the id of an adapter.
        local_files_only: never ask the hub.
    """

    name: str
    local_files_only: bool = False

    def read_config(self) -> Any:
        """Return its config.

        Raises:
            ModelLoadError: peft is not installed, there is no such adapter, or it is no LoRA.
        """
        if find_spec("peft") is None:
            raise ModelLoadError(f"adapter {self.name!r} needs peft: pip install peft")
        from peft import PeftConfig

        try:
            if not self.local_files_only and not os.path.isdir(self._location()):
                check_reachable(self._location(), "adapter_config.json")
            config = PeftConfig.from_pretrained(self._location(), **self._keywords())
        except Exception as error:
            remedy = "; give a folder that peft saved, or an id"
            raise self._refusal("cannot be loaded", error, remedy) from error
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind != "LORA":
            raise ModelLoadError(f"adapter {self.name!r} is of type {kind}; only LORA is served")
        return config

    def add_to(self, model: Any, model_name: str) -> None:
        """Put the adapter on a model, in the dtype of its weights.

        Args:
            model: of transformers; changed in place.
            model_name: for messages.

        Raises:
            ModelLoadError: the adapter is not one of this model's, or is damaged.
        """
        from peft import PeftModel

        fits = f"does not fit model {model_name!r}"
        dtype = {"autocast_adapter_dtype": False}  # else the adapter computes in float32
        try:
            tuned = PeftModel(model, self.read_config(), _NAMED, **dtype)
            report = tuned.load_adapter(
                self._location(), _NAMED, torch_device="cpu", **dtype, **self._keywords()
            )
        except ModelLoadError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self._refusal(fits, error) from error
        for keys, told in (
            (report.missing_keys, "it lacks"),
            (report.unexpected_keys, "the model has no place for"),
        ):
            if keys:
                first = keys[0].removeprefix("base_model.model.")
                raise ModelLoadError(
                    f"adapter {self.name!r} {fits}: {told} {counted(len(keys), 'weight')}, such as "
                    f"{first}"
                )

    def _location(self) -> str:
        folder = os.path.expanduser(self.name)  # Path raises for names that are too long
        return folder if os.path.isdir(folder) else self.name

    def _keywords(self) -> dict[str, Any]:
        return {"local_files_only": True} if self.local_files_only else {}

    def _refusal(self, what: str, error: Exception, remedy: str = "") -> ModelLoadError:
        """Return one line of peft's explanations: where shapes differ, it has one for each."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = next((line for line in lines if line.startswith("size mismatch")), None)
        reason = told or (lines[0] if lines else type(error).__name__)
        return ModelLoadError(f"adapter {self.name!r} {what}: {reason.rstrip('.')}{remedy}")


def adapter_of(model: Any) -> str | None:
    """Return what is known of the adapter on a model, in words; None without one."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    if not layers:
        return None
    ranks = {rank for layer in layers for rank in layer.r.values()}
    matrices = "matrix" if len(layers) == 1 else "matrices"
    return f"LoRA of rank {', '.join(map(str, sorted(ranks)))} on {len(layers)} {matrices}"
