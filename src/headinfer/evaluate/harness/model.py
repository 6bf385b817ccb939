"""The model type `headinfer`, for programs that call lm-evaluation-harness themselves."""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.api import attach
from headinfer.errors import OptionError
from headinfer.evaluate.harness.cached import CachedLM
from headinfer.generation.model import (
    ModelSource,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
)
from headinfer.plan.options import Options


@register_model("headinfer")
class HeadInferLM(CachedLM):
    """A model whose KV cache lies in CPU memory, for lm-evaluation-harness.

    `lm_eval.simple_evaluate(model="headinfer", model_args={...})` makes one, once
    `headinfer.evaluate.harness` was imported. Contexts may be longer than the GPU's memory holds:
    give `max_length` where the config's is not the one wanted.

    Args:
        pretrained: a folder, a hub id, or a model in eval mode that is not attached.
        tokenizer: likewise; None for the model's own.
        dtype: of the weights: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu", "cuda", "cuda:0" or "simulated".
        max_length: the most tokens of prompt and answer; None for the config's.
        batch_size: rows of one pass. With 1, the choices of a question share its context, which is
            read once.
        max_gen_toks: the most tokens of an answer where a task leaves it open.
        add_bos_token: whether prompts begin with the token for that; None for the tokenizer's way.
        prefix_token_id: the token before a text without context.
        chat_template_args: further keywords of the tokenizer's chat template.
        trust_remote_code: run code that comes with the model.
        max_batch_size: has no effect; the harness passes it.
        options: those of `headinfer.attach`, such as `device_memory="24GiB"`.

    Attributes:
        offload: the handle of the attachment, with its plan and statistics.

    Raises:
        HeadInferError: the model or an option is refused.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: Any = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        kind = _kind(str(device))
        Options.parse(**(options | {"device": kind}))  # refused before anything is loaded
        model = pretrained
        if isinstance(pretrained, str):
            source = ModelSource(name=pretrained, trust_remote_code=trust_remote_code)
            model, _ = load_model(
                source,
                load_config(source),
                dtype=str(dtype).removeprefix("torch."),
                device=choose_device(kind),
            )
        if not isinstance(tokenizer, str):
            name = pretrained if isinstance(pretrained, str) else pretrained.name_or_path
            tokenizer = tokenizer or name
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(
                ModelSource(name=tokenizer, trust_remote_code=trust_remote_code)
            )
        assert not isinstance(model, str)
        super().__init__(
            model,
            tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            max_gen_toks=max_gen_toks,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            chat_template_args=chat_template_args,
        )
        given: dict[str, Any] = (
            {} if not isinstance(pretrained, str) and kind == "auto" else {"device": kind}
        )
        self.offload = attach(model, **given, **options)

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache of the attachment."""
        return self.offload.new_cache()

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes beside results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "plan": str(self.offload.plan),
        }

    def close(self) -> None:
        """Leave the model as it was."""
        self.offload.detach()


def _kind(device: str) -> str:
    """Return a device without its index.

    Raises:
        OptionError: it is another GPU than the first, which no option chooses.
    """
    kind, colon, index = device.partition(":")
    if colon and index != "0":
        remedy = (
            f"set CUDA_VISIBLE_DEVICES={index} and " if kind == "cuda" and index.isdecimal() else ""
        )
        raise OptionError(
            f"device must be a kind, or the first of one such as cuda:0, not {device!r}; "
            f"{remedy}give device={kind}"
        )
    return kind
