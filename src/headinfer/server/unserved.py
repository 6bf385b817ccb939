"""Fields that would change an answer and are not served: each is refused by its name."""

from headinfer.server.bodies import ChatBody, CompletionBody, ResponseBody
from headinfer.server.problems import ProblemError

_UNSERVED = {
    "functions": "send them as tools",
    "function_call": "send tool_choice",
    "audio": "leave it out",
    "web_search_options": "leave it out",
}
"""Fields that would change the answer, and what to do instead."""

_ABSENT = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",  # thoughts come as text, which may be sent again
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""What a response may be asked to include that no response has here."""


def check_chat(body: ChatBody) -> None:
    """Refuse what would change a chat's answer and is not served.

    Raises:
        ProblemError: names the field.
    """
    for name, remedy in _UNSERVED.items():
        if getattr(body, name) is not None:
            raise ProblemError(400, f"{name} is not served; {remedy}", param=name)
    if set(body.modalities or ()) - {"text"}:
        raise ProblemError(400, "modalities may have text alone; leave it out", param="modalities")


def check_completion(body: CompletionBody) -> None:
    """Refuse what would change a text's continuation and is not served.

    Raises:
        ProblemError: names the field.
    """
    if body.echo or body.suffix or (body.best_of or 1) > (body.n or 1):
        name = "echo" if body.echo else "suffix" if body.suffix else "best_of"
        raise ProblemError(400, f"{name} is not served; leave it out", param=name)


def check_response(body: ResponseBody) -> None:
    """Refuse what would change a response and is not served.

    Raises:
        ProblemError: names the field.
    """
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise ProblemError(
                400, f"{name} is not served, as nothing is stored; send all items", param=name
            )
    included = set(body.include or ()) - _ABSENT
    if body.top_logprobs or included == {"message.output_text.logprobs"}:
        raise ProblemError(
            400,
            "responses have no log probabilities; /v1/chat/completions has them (logprobs)",
            param="top_logprobs" if body.top_logprobs else "include",
        )
    if included:
        known = ", ".join(sorted(_ABSENT))
        raise ProblemError(400, f"include may have {known}; leave out others", param="include")
    if body.truncation == "auto":
        raise ProblemError(
            400,
            "truncation may be disabled: no items are dropped; send items that fit",
            param="truncation",
        )
