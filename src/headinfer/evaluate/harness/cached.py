"""What the harness asks of a model type, answered through caches of one method."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.errors import OptionError
from headinfer.evaluate.harness.scoring import Score, score_after, score_batch
from headinfer.integration.calls import cache_argument
from headinfer.integration.rotary import rotary_modules_by_length
from headinfer.units import counted

_logger = logging.getLogger(__name__)

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts that a request is remembered by, the tokens of its context, and those to be scored."""


class CachedLM(TemplateLM):
    """A language model of the harness that reads through caches; `new_cache` says which.

    Prompts that are too long lose their beginning, as with the harness's own type `hf`.

    Args:
        model: in eval mode, on its device.
        tokenizer: of transformers.
        max_length: the most tokens of prompt and answer; None for the config's.
        batch_size: rows of one pass. With 1, a context that several continuations follow passes
            through the model once; with more, each pair of them is a row of its own.
        max_gen_toks: the most tokens of an answer where a task leaves it open.
        add_bos_token: whether prompts begin with the token for that; None for the tokenizer's way.
        prefix_token_id: the token before a text without context; None for the first or last token
            of texts.
        chat_template_args: further keywords of the tokenizer's chat template.

    Raises:
        OptionError: a value is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise OptionError(f"batch_size must be a positive integer, not {batch_size!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = int(batch_size)
        self.max_gen_toks = max_gen_toks
        self.max_length = max_length or resolve_max_length(model.config, tokenizer)
        if rotary_modules_by_length(model):
            _warn_once(
                "the model's rotary frequencies follow the length of a call: its scores depend on "
                "batch_size, and on which texts share a call"
            )
        self._device = model.device
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = dict(chat_template_args or {})

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache for up to so many tokens of a row."""
        raise NotImplementedError

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Pass tokens through the model; return the last logits `[vocab]`."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.model.device),
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self.model, cache),
        )
        row: torch.Tensor = output.logits[0, -1]
        return row

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> Any:
        """The token before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, as a part of a file's."""
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as the text of a prompt.

        A template that takes no system message is given the chat without it, with a warning.

        Args:
            chat_history: messages, each with `role` and `content`.
            add_generation_prompt: whether the model is to answer; otherwise it goes on with the
                last message.
        """

        def applied(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )
            return text

        try:
            return applied(chat_history)
        except TemplateError as error:
            others = [each for each in chat_history if each["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = applied(others)
            _warn_once(f"the chat template takes no system message ({error}): it is left out")
            return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the tokens of a text, which never begin with two tokens for the beginning."""
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self._begins(string):
            special = False
        keywords = {} if special is None else {"add_special_tokens": special}
        # A tokenizer warns of texts beyond its `model_max_length`, but prompts are cut later.
        tokens: list[int] = self.tokenizer(string, verbose=False, **keywords)["input_ids"]
        return tokens

    def _begins(self, string: str) -> bool:
        begins: bool = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return begins

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def tok_batch_encode(
        self, strings: Sequence[str], left_truncate_len: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and attention mask of several texts, `[texts, tokens]`, padded on the left.

        Args:
            strings: the texts.
            left_truncate_len: the most tokens of a text; the last ones are kept.
        """
        most = left_truncate_len or None
        rows = [self.tok_encode(string)[-most if most else None :] for string in strings]
        longest = max(map(len, rows))
        return (
            torch.tensor([[self._pad_token_id] * (longest - len(row)) + row for row in rows]),
            torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        )

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = [self._cut(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(cut), disable=disable_tqdm, desc="Continuations scored") as bar:
            scores = self._scores(cut, bar)
        found = [(score.loglikelihood, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _cut(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Drop the beginning of a context, so that the last token but one is within the length."""
        if not continuation:
            raise OptionError("a continuation without tokens cannot be scored")
        if len(continuation) > self.max_length:
            raise OptionError(
                f"a continuation of {counted(len(continuation), 'token')} is longer than "
                f"max_length {self.max_length:,}"
            )
        room = self.max_length + 1 - len(continuation)
        return tuple(context[-room:]), tuple(continuation)

    def _scores(
        self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], bar: Any
    ) -> list[Score]:
        """Score pairs, each different one once; the longest come first."""
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], Score] = {}
        if self.batch_size > 1:
            different = sorted(set(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
            for start in range(0, len(different), self.batch_size):
                rows = different[start : start + self.batch_size]
                found |= zip(rows, score_batch(self, rows), strict=True)
                bar.update(len(rows))
        else:
            groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
            for context, continuation in pairs:
                groups.setdefault(context, {})[continuation] = None
            for context, group in sorted(groups.items(), key=lambda each: -len(each[0])):
                rows = [(context, continuation) for continuation in group]
                found |= zip(rows, score_after(self, context, list(group)), strict=True)
                bar.update(len(rows))
        return [found[pair] for pair in pairs]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text as a whole.

        A text beyond `max_length` is read in windows, and each token is scored once.
        """
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Texts scored"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs: list[Pair] = [(None, *make_disjoint_window(each)) for each in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each prompt, up to its first stop text."""
        ordered = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        texts: list[str] = []
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Answers generated")
        for batch in ordered.get_batched(n=self.batch_size):
            prompts, keywords = zip(*batch, strict=True)
            texts += self._generate(prompts, keywords[0])
            for prompt, text in zip(prompts, texts[-len(prompts) :], strict=True):
                self.cache_hook.add_partial("generate_until", (prompt, keywords[0]), text)
            bar.update(len(prompts))
        bar.close()
        arranged: list[str] = ordered.get_original(texts)
        return arranged

    @torch.no_grad()
    def _generate(self, prompts: Sequence[str], gen_kwargs: Mapping[str, Any]) -> list[str]:
        """Return the answers to several prompts, generated in one batch."""
        keywords: dict[str, Any] = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        new_tokens = keywords.pop("max_gen_toks")
        end = self.eot_token_id
        ending = None if end is None else self.tok_decode([end], skip_special_tokens=False)
        until = handle_stop_sequences(keywords.pop("until"), eos=ending)
        if not keywords["do_sample"]:
            keywords.pop("temperature", None)  # it means nothing, and transformers would say so
        tokens, mask = self.tok_batch_encode(prompts, self._prompt_room(new_tokens))
        output = self.model.generate(
            input_ids=tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new_tokens,
            pad_token_id=self._pad_token_id,
            stopping_criteria=stop_sequences_criteria(
                self.tokenizer, until, tokens.shape[1], len(prompts)
            ),
            use_cache=True,
            **cache_argument(self.model, self.new_cache(tokens.shape[1] + new_tokens)),
            **keywords,
        )
        return [
            postprocess_generated_text(self.tok_decode(row[tokens.shape[1] :]), until, None)
            for row in output.tolist()
        ]

    @property
    def _pad_token_id(self) -> int:
        """A token for where a row has none."""
        given = (self.tokenizer.pad_token_id, self.eot_token_id, 0)
        return next(int(token) for token in given if token is not None)

    def _prompt_room(self, new_tokens: int) -> int:
        """Return the most tokens of a prompt that leave room for an answer."""
        room = self.max_length - new_tokens
        if room < 1:
            raise OptionError(
                f"answers of {counted(new_tokens, 'token')} leave no room for a prompt within "
                f"max_length {self.max_length:,}; give a larger max_length, or a smaller "
                "max_gen_toks"
            )
        return room


@functools.cache
def _warn_once(line: str) -> None:
    """Say a line once in a process."""
    _logger.warning("%s", line)
