"""`headinfer.generate`: a prompt's answer as a stream of records, with what was measured."""

import contextlib
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from headinfer.api import attach, check_progress
from headinfer.disk.folder import check_folder
from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.generation.assistants import check_assistant, load_assistant
from headinfer.generation.call import FinishReason, Generation
from headinfer.generation.drafts import Drafts
from headinfer.generation.draws import check_seed
from headinfer.generation.gpus import Gpus
from headinfer.generation.model import (
    ModelSource,
    choose_device,
    load_config,
    load_model,
    load_tokenizer,
)
from headinfer.generation.pace import check_number, drafts_itself
from headinfer.generation.prompt import Prompt, encode_prompt
from headinfer.generation.quantised import check_load_in
from headinfer.generation.settings import check_given, settle
from headinfer.generation.stops import check_stop
from headinfer.generation.worker import Worker
from headinfer.gguf_models import unpacked_dtype
from headinfer.integration.attachment import owner_of
from headinfer.integration.cache import PrefillProgress
from headinfer.plan.options import DECLARATIONS, Options
from headinfer.session import Session

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A piece of an answer, and what was measured of the whole call until then.

    Attributes:
        text: new since the record before; empty in the last one at most.
        tokens: of the answer so far.
        prompt_tokens: of the prompt.
        prefill_s: seconds the prompt took.
        prefill_tokens_per_s: speed of the prompt.
        decode_s: seconds the tokens after the first took, without captures.
        decode_tokens_per_s: speed of those.
        capture_s: seconds that captures of decode steps took, with what torch compiled for them.
        verifications: passes that verified drafts.
        drafted_tokens: drafts that they verified.
        accepted_tokens: drafts that were right; each verification gives one token more.
        draft_s: seconds of drafting, which are a part of `decode_s`.
        draft_read_s: seconds in which an assistant read the prompt, beside all other times.
        verify_s: seconds of those passes, another part of it.
        peak_device_kv_bytes: the most GPU memory that this call's cache held.
        host_kv_bytes: the most CPU memory that this call's cache held.
        standard_kv_bytes: GPU memory that standard inference would have held for its tokens.
        finish_reason: None before the last record; there "stop" for an end token or stop string,
            "length" for `max_new_tokens`, "time" for `max_time`.
    """

    text: str
    tokens: int
    prompt_tokens: int
    prefill_s: float
    prefill_tokens_per_s: float
    decode_s: float
    decode_tokens_per_s: float
    capture_s: float
    verifications: int
    drafted_tokens: int
    accepted_tokens: int
    draft_s: float
    draft_read_s: float
    verify_s: float
    peak_device_kv_bytes: int
    host_kv_bytes: int
    standard_kv_bytes: int
    finish_reason: FinishReason | None = None


def generate(
    model: "str | os.PathLike[str] | PreTrainedModel",
    prompt: Prompt,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    load_in: str | None = None,
    adapter: "str | os.PathLike[str] | None" = None,
    gpus: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    stop: str | Sequence[str] | None = None,
    progress: PrefillProgress | None = None,
    draft: str | int | None = None,
    assistant: "str | os.PathLike[str] | PreTrainedModel | None" = None,
    seed: int | None = None,
    **keywords: Any,
) -> Generator[Generated, None, None]:
    """Answer a prompt, record by record.

    Nothing is loaded or attached before the first record is asked for. The texts of all records
    together are the answer; the last record says why it ended. Closing the generator, or
    interrupting whoever waits for a record, stops the model at its next token or chunk. A model
    that was attached here is detached before the last record, and after an early end.

    Args:
        model: a folder, the id of a model, or a loaded model. An attached model is used as it is,
            by several threads too.
        prompt: text as it is, messages for the model's chat template, or token ids.
        tokenizer: of a loaded model; a model's own where it is loaded here.
        dtype: of weights that are loaded here: "auto" as they were saved, or a torch dtype's name.
        load_in: "4bit" or "8bit" to quantise weights that are loaded here.
        adapter: a LoRA for a model that is loaded here: a folder or the id of one.
        gpus: how many GPUs to spread the layers of a model over that is loaded here.
        chat_template_kwargs: values for the chat template, such as `{"enable_thinking": False}`.
        stop: strings that end the answer and are no part of it. A special token may be one.
            (`stop_strings`, which transformers has, stay in the text.)
        progress: called during prefill with the tokens done and the tokens in all; may raise.
        draft: how many tokens are drafted at a time: a number, "off", or "auto" for what makes a
            token cheapest by times measured. The assistant drafts, or a lookup in the prompt.
            Without these the model drafts itself, if it was attached with `draft_tokens`. A model
            that is attached here is, where `draft` is given.
        assistant: a smaller model with the same tokenizer, which drafts: a folder, an id, or a
            loaded model.
        seed: of what is drawn; the same one draws the same tokens. None for torch's generator.
        keywords: options of `attach`, unless the model is attached; and settings of transformers'
            `GenerationConfig`, `max_new_tokens` being 256 unless given. `temperature`, `top_k`,
            `top_p` and `min_p` turn sampling on.

    Returns:
        A generator of records.

    Raises:
        HeadInferError: an option is wrong; this is raised at once. The model cannot be loaded or
            served, or the prompt does not fit: this is raised when the first record is asked for.
    """
    options = {name: keywords.pop(name) for name in DECLARATIONS if name in keywords}
    given = {name: value for name, value in keywords.items() if value is not None}
    check_given(given, {*DECLARATIONS, *inspect.signature(generate).parameters} - {"keywords"})
    check_seed(seed)
    check_progress(progress)
    number = None if draft is None else check_number(draft)
    helper = check_assistant(assistant)
    parsed = Options.parse(**options)
    if parsed.disk_cache is not None:
        check_folder(parsed.disk_cache)
    set_aside = parsed.draft_tokens if "draft_tokens" in options else None
    if drafts_itself(number, helper, given, set_aside) and owner_of(model) is None:
        options.setdefault("draft_tokens", "auto")
    strings = check_stop(stop)
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise OptionError(
            f"chat_template_kwargs must be a mapping of names, not {chat_template_kwargs!r}"
        )
    forms = {"dtype": dtype, "load_in": load_in, "adapter": adapter, "gpus": gpus}
    source = _source(model, tokenizer, Gpus.of(gpus, parsed), **forms)

    def with_model() -> Generator[Generated, None, None]:
        attached_options, loaded, own_tokenizer = options, model, tokenizer
        if source is not None:
            if source.gpus is not None:
                source.gpus.prepare()
            device = choose_device(parsed.device)
            if source.gpus is not None:
                source.gpus.check(device)
            loaded, own_tokenizer = _load(source, dtype, device, tokenizer)
            attached_options = options | {"device": device}
        assert isinstance(loaded, PreTrainedModel)
        ids = encode_prompt(own_tokenizer, prompt, chat_template_kwargs)
        _check_vocabulary(loaded, ids)
        drafts = Drafts(number=number, assistant=load_assistant(helper, loaded))
        yield from _stream(
            *(loaded, own_tokenizer, ids, attached_options, given, strings, progress, drafts),
            seed=seed,
        )

    return with_model()


def _source(
    model: object, tokenizer: object, spread: Gpus | None, **forms: Any
) -> ModelSource | None:
    """Return where to load a model from; None for one that is loaded, which has its form."""
    if isinstance(model, PreTrainedModel):
        if not callable(tokenizer):
            what = "" if tokenizer is None else f", which {tokenizer!r} is not"
            raise OptionError(f"a loaded model needs its tokenizer, loaded too{what}")
        for name, value in forms.items():
            if value not in (None, "auto"):
                raise OptionError(
                    f"{name}={value!r} is for models that are loaded here; leave it out"
                )
        return None
    if not isinstance(model, (str, os.PathLike)):
        raise OptionError(f"model must be a folder, an id or a loaded model, not {model!r}")
    adapter = forms["adapter"]
    if adapter is not None and not isinstance(adapter, (str, os.PathLike)):
        raise OptionError(f"adapter must be a folder or an id, not {adapter!r}")
    return ModelSource(
        name=os.fspath(model),
        load_in=check_load_in(forms["load_in"]),
        adapter=None if adapter is None else os.fspath(adapter),
        unpacked_dtype=unpacked_dtype(forms["dtype"]),
        gpus=spread,
    )


def _check_vocabulary(model: PreTrainedModel, ids: list[int]) -> None:
    """Refuse token ids that the model has no embedding for."""
    known = model.get_input_embeddings().weight.shape[0]
    wrong = [token_id for token_id in ids if not 0 <= token_id < known]
    if wrong:
        raise OptionError(
            f"the prompt has token id {wrong[0]}, but the model knows ids from 0 to {known - 1}; "
            "use the model's own tokenizer"
        )


def _load(
    source: ModelSource, dtype: str, device: str, tokenizer: Any
) -> tuple[PreTrainedModel, Any]:
    config = load_config(source)
    tokenizer = tokenizer or load_tokenizer(source)
    model, unused = load_model(source, config, dtype=dtype, device=device)
    if unused is not None:
        _logger.warning(unused)
    return model, tokenizer


def _stream(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: list[int],
    options: dict[str, Any],
    given: dict[str, Any],
    stop: Sequence[str],
    progress: PrefillProgress | None,
    drafts: Drafts,
    *,
    seed: int | None,
) -> Generator[Generated, None, None]:
    """Yield the records of an answer."""
    settings = settle(given, model.generation_config, len(ids))
    if (note := settings.note()) is not None:
        _logger.warning(note)
    worker = Worker[Generated]()
    tokens = len(ids) + settings.max_new_tokens
    held = drafts.assistant_tokens(model, settings, tokens)
    with (
        _attached(model, options) as session,
        session.assistants.during(drafts.assistant, held),
    ):
        worker.ranks = session.ranks
        generation = Generation(
            model,
            tokenizer,
            session,
            settings,
            lambda piece: worker.hand_on(_record(generation, piece)),
            progress=lambda done, of: worker.report(progress, done, of),
            criteria=[worker.criterion],
            stop=stop,
            drafts=drafts,
            seed=seed,
        )
        yield from worker.records(session.device.torch_device, lambda: generation.run(ids))
    yield _record(generation, "", finish_reason=generation.finish_reason)


def _record(generation: Generation, text: str, **ended: FinishReason) -> Generated:
    stats = generation.stats
    return Generated(
        text=text,
        tokens=len(generation.ids),
        prompt_tokens=generation.prompt_tokens,
        prefill_s=stats.prefill_s,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        decode_s=stats.decode_s,
        decode_tokens_per_s=stats.decode_tokens_per_s,
        capture_s=stats.capture_s,
        verifications=stats.verifications,
        drafted_tokens=stats.drafted_tokens,
        accepted_tokens=stats.accepted_tokens,
        draft_s=stats.draft_s,
        draft_read_s=stats.draft_read_s,
        verify_s=stats.verify_s,
        peak_device_kv_bytes=stats.peak_device_kv_bytes,
        host_kv_bytes=stats.host_kv_bytes,
        standard_kv_bytes=stats.standard_kv_bytes,
        **ended,
    )


_attaching = threading.Lock()
_ours: "weakref.WeakSet[Session]" = weakref.WeakSet()
"""Sessions that end with the call of `generate` that made them."""


@contextlib.contextmanager
def _attached(model: PreTrainedModel, options: dict[str, Any]) -> Iterator[Session]:
    """Attach to a model inside the `with` statement, unless its user has."""
    with _attaching:
        owner = owner_of(model)
        if owner is None:
            session = attach(model, **options).session
            _ours.add(session)
    if owner is not None:
        assert isinstance(owner, Session)
        _check_shared(owner, options)
        yield owner
        return
    try:
        yield session
    finally:
        session.detach()


def _check_shared(session: Session, options: dict[str, Any]) -> None:
    """Refuse what cannot be had of a model that somebody else attached."""
    if session in _ours:
        raise UnsupportedModelError(
            "another call of generate is at work on this model and will detach it; close that one "
            "first, or attach the model yourself and call generate as often as you like"
        )
    if options:
        named = ", ".join(options)
        raise OptionError(f"the model is attached already, with options of its own; drop {named}")
