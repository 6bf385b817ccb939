"""Measure how long two questions about one document wait for the first token of their answers.

    python benchmarks/second_question.py [--model smollm2] [--tokens 7000]

It starts `headinfer serve`, asks about Python's manual twice, and prints one JSON object: the
seconds from sending each question to the first text of its answer, and the tokens that each found
in a kept prefix.
"""

import argparse
import json
import subprocess
import time
from typing import Any

from server_load import COMMAND, WAIT_S, connect, wait_ready

from headinfer.demo.manual import make_manual


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=7000)
    options = parser.parse_args()
    document = make_manual(options.tokens, lambda text: len(text) // 4)
    command = [*COMMAND, "serve", "--port", "0", "--model", options.model, "--device", "cpu", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        wait_ready(url, process)
        asked = [ask(url, document.message(hidden.question)) for hidden in document.hidden[:2]]
    finally:
        process.terminate()
        process.wait(WAIT_S)
    first, second = (each["seconds"] for each in asked)
    print(json.dumps({"asked": asked, "ratio": round(second / first, 4)}, indent=2))


def ask(url: str, text: str) -> dict[str, Any]:
    """Return the seconds to the first text of an answer, and the tokens of the prompt."""
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "stream": True, "max_tokens": 8, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    connection = connect(url)
    began, seconds, usage = time.monotonic(), 0.0, {}
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line.removeprefix(b"data: "))
        usage = told.get("usage") or usage
        said = any(choice["delta"].get("content") for choice in told["choices"])
        seconds = seconds or (time.monotonic() - began if said else 0.0)
    connection.close()
    return {
        "seconds": round(seconds, 2),
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
    }


if __name__ == "__main__":
    main()
