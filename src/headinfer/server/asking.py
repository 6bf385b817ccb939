"""Requests as what a desk is asked."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headinfer.errors import HeadInferError
from headinfer.generation.prompt import Prompt, encode_prompt, knows_value, message_ends
from headinfer.server.bodies import (
    ChatBody,
    CompletionBody,
    Generating,
    ResponseBody,
    ResponseFormat,
    Sampling,
    Stops,
    TextFormat,
)
from headinfer.server.calls import call_grammar, wanted_tools
from headinfer.server.messages import chat_messages, chat_tools, response_messages, response_tools
from headinfer.server.problems import ProblemError, problem_of
from headinfer.server.served import DEFAULT_NEW_TOKENS, Limits, Served
from headinfer.server.unserved import check_chat, check_completion, check_response
from headinfer.serving.ask import Ask
from headinfer.units import counted

_MOST_STOPS = 32
_MOST_CHOICES = 64
_SETTINGS = ("top_k", "min_p", "repetition_penalty")
_ANY_OBJECT = {"type": "object"}

Processors = Callable[[], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request, ready to be asked.

    Attributes:
        asks: one for each choice, in their order.
        tools: that the model may call; in the form of chat templates.
        spelled: whether pieces have tokens, which are parsed in the place of their text.
        one_call: whether an answer calls one tool at most.
    """

    asks: tuple[Ask, ...]
    tools: list[dict[str, Any]] | None = None
    spelled: bool = False
    one_call: bool = False


def chat_request(served: Served, body: ChatBody, limits: Limits) -> Request:
    """Return what a conversation's request asks.

    Raises:
        HeadInferError: it cannot be had.
        ProblemError: the same.
    """
    check_chat(body)
    tools = chat_tools(body.tools, body.tool_choice)
    values = _values(served, body, tools, body.reasoning_effort)
    messages = chat_messages(body.messages)
    ids = _encode(served, messages, values)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise ProblemError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if logprobs is not None:
        served.guide.bytes_of(0, "")  # here, in a thread, as the first one takes a second
    new_tokens = body.max_completion_tokens or body.max_tokens
    schema = _schema(body.response_format)
    guided = _guided(served, schema, ids, wanted_tools(tools, body.tool_choice))
    ask = _ask(served, body, ids, new_tokens, limits, logprobs, guided)
    ask, spelled = _spelled(served, _marked(served, ask, messages, values))
    return Request(
        asks=_choices(ask, body.n or 1),
        tools=tools,
        spelled=spelled,
        one_call=body.parallel_tool_calls is False,
    )


def completion_request(served: Served, body: CompletionBody, limits: Limits) -> Request:
    """Return what a text's request asks: so many choices for each prompt.

    Raises:
        HeadInferError: it cannot be had.
        ProblemError: the same.
    """
    check_completion(body)
    if body.logprobs is not None:
        served.guide.bytes_of(0, "")  # as above
    asks: list[Ask] = []
    prompts = _prompts(body.prompt, body.n or 1)
    for idx, prompt in enumerate(prompts):
        try:
            ids = _encode(served, prompt, {})
        except HeadInferError as error:
            told = problem_of(error)
            which = f"prompt.{idx}: " if len(prompts) > 1 else ""
            raise ProblemError(
                told.status, f"{which}{told.message}", param="prompt", code=told.code
            ) from error
        guided = _guided(served, _schema(body.response_format), ids, None)
        ask = _ask(served, body, ids, body.max_tokens, limits, body.logprobs, guided)
        asks += _choices(ask, body.n or 1)
    return Request(asks=tuple(asks))


def response_request(served: Served, body: ResponseBody, limits: Limits) -> Request:
    """Return what a response's request asks.

    Raises:
        HeadInferError: it cannot be had.
        ProblemError: the same.
    """
    check_response(body)
    tools = response_tools(body.tools, body.tool_choice)
    values = _values(served, body, tools, body.reasoning.effort if body.reasoning else None)
    messages = response_messages(body.input, body.instructions)
    ids = _encode(served, messages, values)
    schema = _schema(body.text.format if body.text else None)
    guided = _guided(served, schema, ids, wanted_tools(tools, body.tool_choice))
    ask = _ask(served, body, ids, body.max_output_tokens, limits, None, guided)
    ask, spelled = _spelled(served, _marked(served, ask, messages, values))
    one_call = body.parallel_tool_calls is False
    return Request(asks=(ask,), tools=tools, spelled=spelled, one_call=one_call)


def _values(
    served: Served,
    body: ChatBody | ResponseBody,
    tools: list[dict[str, Any]] | None,
    effort: str | None,
) -> dict[str, Any]:
    """Return values for the chat template; an effort means nothing to most models."""
    values: dict[str, Any] = {}
    if effort is not None and knows_value(served.tokenizer, "reasoning_effort"):
        values["reasoning_effort"] = effort
    values |= body.chat_template_kwargs or {}
    return values | ({"tools": tools} if tools else {})


def _marked(
    served: Served, ask: Ask, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]
) -> Ask:
    """Note where messages end, for a model whose cache cannot go back there."""
    if not served.desk.uses_marks:
        return ask
    return replace(ask, marks=message_ends(served.tokenizer, messages, values))


def _spelled(served: Served, ask: Ask) -> tuple[Ask, bool]:
    """Ask for tokens where a message is told apart by special ones.

    Strings that stop an answer cut its text alone. Where there are some, the text is parsed.
    """
    if not served.spelled or ask.stop:
        return ask, False
    return (ask if ask.logprobs is not None else replace(ask, logprobs=0)), True


def _prompts(given: str | list[str] | list[int] | list[list[int]], count: int) -> Sequence[Prompt]:
    """Return the prompts of a request, unless they have too many choices."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise ProblemError(400, "prompt is an empty list; give text or token ids", param="prompt")
    if isinstance(given[0], int):
        return [[int(part) for part in given]]
    if (choices := len(given) * count) > _MOST_CHOICES:
        raise ProblemError(
            400,
            f"prompt has {counted(len(given), 'prompt')} and n is {count}: {choices} choices, and "
            f"{_MOST_CHOICES} can be had",
            param="prompt",
        )
    return list(given)  # several prompts


def _encode(served: Served, prompt: Prompt, values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return a prompt's tokens, unless its bytes show that they are too many."""
    return tuple(encode_prompt(served.tokenizer, prompt, values, served.desk.check_text))


def _choices(ask: Ask, count: int) -> tuple[Ask, ...]:
    """Return the asks of several choices: with a seed each has one of its own."""
    if ask.seed is None:
        return (ask,) * count
    return tuple(replace(ask, seed=ask.seed + number) for number in range(count))


def _ask(
    served: Served,
    body: Sampling,
    ids: tuple[int, ...],
    new_tokens: int | None,
    limits: Limits,
    logprobs: int | None,
    guided: list[Processors],
) -> Ask:
    makers: list[Processors] = []
    given = _settings(body)
    if isinstance(body, Generating):
        given |= _biases(served, body.logit_bias)
        makers += _penalties(body)
    makers += guided
    given["max_new_tokens"] = _new_tokens(served, len(ids), new_tokens, limits)
    stop = _stops(body.stop) if isinstance(body, Generating) else ()
    return Ask(
        ids=ids,
        given=given,
        stop=stop,
        logprobs=logprobs,
        processors=(lambda: [part for make in makers for part in make()]) if makers else None,
        seed=body.seed,
    )


def _guided(
    served: Served,
    schema: dict[str, Any] | bool | None,
    ids: Sequence[int],
    wanted: Sequence[Mapping[str, Any]] | None,
) -> list[Processors]:
    """Return what holds an answer to a schema, or to a call of one of some tools."""
    if wanted is None:
        return [] if schema is None else [served.guide.processors(schema)]
    if schema is not None:
        raise ProblemError(
            400, "a call is forced, so there is no text to have a form", param="response_format"
        )
    grammar = call_grammar(served.model, served.tokenizer, ids, wanted)
    return [served.guide.following(grammar)]


def _settings(body: Sampling) -> dict[str, Any]:
    """Return what is set of how tokens are chosen; what is not set is the model's own."""
    given: dict[str, Any] = {
        name: value for name in _SETTINGS if (value := getattr(body, name)) is not None
    }
    if body.temperature == 0:
        return {"do_sample": False} | {
            name: value for name, value in given.items() if name == "repetition_penalty"
        }
    if body.temperature is not None:
        given["temperature"] = body.temperature
    if body.top_p is not None:
        given["top_p"] = body.top_p
    if given.keys() - {"repetition_penalty"}:
        given["do_sample"] = True
    return given


def _biases(served: Served, given: dict[str, float] | None) -> dict[str, Any]:
    if not given:
        return {}
    vocabulary = served.model.get_input_embeddings().weight.shape[0]
    for token in given:
        if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= vocabulary:
            raise ProblemError(
                400,
                f"logit_bias takes ids of tokens, from 0 to {vocabulary - 1}",
                param="logit_bias",
            )
    return {"sequence_bias": [[[int(token)], float(bias)] for token, bias in given.items()]}


def _penalties(body: Generating) -> list[Processors]:
    presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
    if not presence and not frequency:
        return []
    from headinfer.server.penalties import Penalties

    return [lambda: [Penalties(presence, frequency)]]


def _new_tokens(served: Served, prompt_tokens: int, asked: int | None, limits: Limits) -> int:
    """Return the most tokens of an answer."""
    most = limits.new_tokens
    if asked is not None:
        if most is not None and asked > most:
            raise ProblemError(
                400, f"{asked} new tokens are asked for; this server's limit is {most}"
            )
        return asked
    bounds = [DEFAULT_NEW_TOKENS] + ([most] if most is not None else [])
    if served.positions > prompt_tokens:
        bounds.append(served.positions - prompt_tokens)
    return min(bounds)


def _stops(given: Stops) -> tuple[str, ...]:
    stops = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > _MOST_STOPS:
        raise ProblemError(400, f"stop takes at most {_MOST_STOPS} strings", param="stop")
    if not all(stops):
        raise ProblemError(400, "stop takes strings that are not empty", param="stop")
    return stops


def _schema(form: ResponseFormat | TextFormat | None) -> dict[str, Any] | bool | None:
    """Return the JSON schema that an answer must follow, if any."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return _ANY_OBJECT
    holder = form.json_schema if isinstance(form, ResponseFormat) else form
    if holder is None or holder.schema_ is None:
        raise ProblemError(400, "json_schema needs a schema", param="response_format")
    return holder.schema_
