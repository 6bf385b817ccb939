"""Hang up on a long prompt, ask again, and measure how long a client hears nothing meanwhile.

    python benchmarks/long_prompt.py [--tokens 131072] [--json FILE]

It starts `headinfer serve` with the embedded model and sends it a document as a stream. After half
of the prompt the client goes away, and another one sends the same. A third asks something else. It
prints one JSON object with, of each of them, the seconds to the headers and to the first text, the
longest time without a telling of progress before that, and the tokens from a kept prefix.
"""

import argparse
import json
import subprocess
import time
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import torch
from server_load import COMMAND, WAIT_S, connect, wait_ready

from headinfer.bench.document import provenance
from headinfer.bench.machine import hardware
from headinfer.demo import make_document


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document = make_document(options.tokens)
    texts = [document.message(fact.question) for fact in document.facts[:2]]
    command = [*COMMAND, "serve", "--port", "0", "--device", "cpu", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        wait_ready(url, process)
        asked = [
            ask(url, texts[0], until_tokens=options.tokens // 2),
            ask(url, texts[0]),
            ask(url, texts[1]),
        ]
    finally:
        process.terminate()
        process.wait(WAIT_S)
    result = {
        **provenance(),
        "hardware": hardware(torch.device("cpu")),
        "tokens": options.tokens,
        "asked": asked,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(asked, indent=2))


def ask(url: str, text: str, *, until_tokens: int | None = None) -> dict[str, Any]:
    """Return what a client saw that goes away once so many tokens were read."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "return_progress": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
    }
    connection = connect(url)
    began = time.monotonic()
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    seen = {"headers_s": round(time.monotonic() - began, 2)}
    try:
        return seen | heard(response, began, until_tokens)
    finally:
        connection.close()


def heard(response: HTTPResponse, began: float, until_tokens: int | None) -> dict[str, Any]:
    """Return what was told in a stream, and when."""
    last, longest, first_text_s = began, 0.0, None
    progress: dict[str, Any] = {}
    answer = ""
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line.removeprefix(b"data: "))
        delta = told["choices"][0]["delta"] if told["choices"] else {}
        now = time.monotonic()
        if first_text_s is None:
            longest, last = max(longest, now - last), now
            first_text_s = now - began if delta.get("content") else None
        answer += delta.get("content") or ""
        progress = told.get("prompt_progress") or progress
        if until_tokens is not None and progress.get("processed", 0) >= until_tokens:
            break
    return {
        "prompt_tokens": progress.get("total"),
        "cached_tokens": progress.get("cache"),
        "read_tokens": progress.get("processed"),
        "seconds": round(time.monotonic() - began, 2),
        "first_text_s": None if first_text_s is None else round(first_text_s, 2),
        "longest_silence_s": round(longest, 2),
        "answer": answer,
    }


if __name__ == "__main__":
    main()
