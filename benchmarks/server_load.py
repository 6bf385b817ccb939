"""Put a server under load: many clients, some of which hang up or send what is no request.

    python benchmarks/server_load.py [--requests 1000] [--clients 20] [--model demo] [--seed 0]
    python benchmarks/server_load.py --model smollm2 --facts 8 --new-tokens 8

It starts `headinfer serve` and sends it questions about strongboxes. A third of the requests are
hung up at a random moment, are no requests at all, or are too large. Every answer that comes is
compared with the command line's to the same prompt. The memory of the server is read before,
at half, and after, at rest. It prints one JSON object, and ends with 1 where anything is wrong.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlparse

from headinfer.demo import words

COMMAND = [sys.executable, "-m", "headinfer.cli.main"]
MOST_BODY = 1024 * 1024
WAIT_S = 600.0
WARMING = 3
"""Requests of each client before memory is read first."""

GROWN_MIB = 64
"""More memory than this after all requests, prefixes left aside, is taken for a leak."""


def main() -> None:
    """Run it."""
    options = parse()
    questions = make_questions(options.questions, options.facts)
    expected = {text: generate(options, text) for text in questions}
    process = start(options)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        wait_ready(url, process)
        for text in questions:  # once each, so that prefixes are kept before memory is read
            ask(url, text, options.new_tokens)
        # All at once, too: what several requests and their threads take, stays with the process.
        warming = range(-WARMING * options.clients, 0)
        load(url, options, questions, expected, warming)
        memory = [memory_mib(process.pid, url)]
        begun = time.monotonic()
        outcomes: Counter[str] = Counter()
        half = options.requests // 2
        for numbers in (range(half), range(half, options.requests)):
            outcomes += load(url, options, questions, expected, numbers)
            memory.append(memory_mib(process.pid, url))
        seconds = time.monotonic() - begun
        again = [
            text for text in questions if ask(url, text, options.new_tokens)[1] != expected[text]
        ]
        kept = sum(slot["cpu_bytes"] for slot in get_json(url, "/slots")) / 2**20
        threads = len(os.listdir(f"/proc/{process.pid}/task"))
        alive = process.poll() is None
        ending = time.monotonic()
        process.terminate()
        code = process.wait(WAIT_S)
    finally:
        if process.poll() is None:
            process.kill()
    wrong = outcomes["wrong answer"] + outcomes["unexpected"] + len(again)
    report = {
        "model": options.model,
        "requests": options.requests,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "wrong_after": len(again),
        "alive": alive,
        "memory_before_half_after_mib": memory,
        "kept_prefixes_mib": round(kept, 1),
        "threads": threads,
        "exit_code": code,
        "seconds_to_end": round(time.monotonic() - ending, 1),
    }
    print(json.dumps(report, indent=2))
    leaked = memory[-1] - memory[0] > GROWN_MIB
    sys.exit(bool(wrong or leaked or not alive or code))


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--facts", type=int, default=150, help="of a text, at most")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--cache-memory", default="64MiB", help="for kept prefixes")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_questions(count: int, most_facts: int) -> list[str]:
    """Return different texts of facts, each with a question about one of them at the end."""
    drawn = random.Random(1)
    names = [f"{adjective} {noun}" for adjective in words.ADJECTIVES for noun in words.NOUNS]
    texts = []
    for _ in range(count):
        known = drawn.sample(names, drawn.randint(1, most_facts))
        facts = [
            f"The strongbox of the {name} opens with"
            f"{drawn.choice(words.FIRST_HALVES)}{drawn.choice(words.SECOND_HALVES)}."
            for name in known
        ]
        question = f"What opens the strongbox of the {drawn.choice(known)}?"
        texts.append(" ".join([*facts, question]))
    return texts


def generate(options: argparse.Namespace, text: str) -> str:
    """Return the command line's answer."""
    command = [*COMMAND, "generate", "--model", options.model, "--device", "cpu", "-q", "-f", "-"]
    command += ["--no-do-sample", "--max-new-tokens", str(options.new_tokens)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


def start(options: argparse.Namespace) -> "subprocess.Popen[str]":
    """Start the server."""
    command = [*COMMAND, "serve", "--port", "0", "--model", options.model, "--device", "cpu"]
    command += ["--max-body", f"{MOST_BODY}B", "--queue", str(options.clients), "--quiet"]
    command += ["--cache-memory", options.cache_memory]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def load(
    url: str,
    options: argparse.Namespace,
    questions: list[str],
    expected: dict[str, str],
    numbers: range,
) -> "Counter[str]":
    """Send requests by their numbers, and count how they ended."""
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()

    def one(number: int) -> None:
        drawn = random.Random(options.seed * 1_000_003 + number)
        outcome = send(url, drawn, options, questions, expected)
        with lock:
            outcomes[outcome] += 1

    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        list(pool.map(one, numbers))
    return outcomes


def send(
    url: str,
    drawn: random.Random,
    options: argparse.Namespace,
    questions: list[str],
    expected: dict[str, str],
) -> str:
    """Send one request, and return how it ended."""
    text = drawn.choice(questions)
    kind = drawn.random()
    try:
        if kind < 2 / 3:
            status, answer = ask(url, text, options.new_tokens, stream=drawn.random() < 0.5)
            if status != 200:
                return "unexpected"
            return "right answer" if answer == expected[text] else "wrong answer"
        if kind < 5 / 6:
            hang_up(url, text, options.new_tokens, drawn)
            return "hung up"
        body, status = drawn.choice(malformed())
        return "refused" if post(url, body)[0] == status else "unexpected"
    except (OSError, HTTPException, ValueError) as error:
        sys.stderr.write(f"unexpected: {type(error).__name__}: {error}\n")
        return "unexpected"


def malformed() -> list[tuple[bytes, int]]:
    """Return bodies that are refused, and by what status."""
    return [
        (b"", 400),
        (b"{", 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 5000, 400),
        (b'{"messages": []}', 400),
        (b'{"messages": [{"role": "user", "content": {"a": 1}}]}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}', 400),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2147483647}', 400),
        (json.dumps({"messages": [{"role": "user", "content": "a" * MOST_BODY}]}).encode(), 413),
    ]


def body_of(text: str, new_tokens: int, *, stream: bool) -> bytes:
    """Return a request."""
    asked = {"messages": [{"role": "user", "content": text}], "stream": stream, "temperature": 0}
    return json.dumps({**asked, "return_progress": stream, "max_tokens": new_tokens}).encode()


def ask(url: str, text: str, new_tokens: int, *, stream: bool = False) -> tuple[int, str]:
    """Return the status and the answer."""
    status, answer = post(url, body_of(text, new_tokens, stream=stream))
    if status != 200:
        return status, ""
    if not stream:
        return status, json.loads(answer)["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line[:5] == "data:"]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    return status, "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def hang_up(url: str, text: str, new_tokens: int, drawn: random.Random) -> None:
    """Begin a request and go away at some moment."""
    connection = connect(url)
    body = body_of(text, new_tokens, stream=drawn.random() < 0.5)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    moment = drawn.random()
    if moment < 0.2:
        connection.send(body[: drawn.randrange(len(body))])  # in the middle of the request
    else:
        connection.send(body)
        time.sleep(drawn.uniform(0, 1.5))
        if moment > 0.8 and connection.sock is not None:
            connection.sock.settimeout(1.0)
            with contextlib.suppress(OSError):
                connection.sock.recv(drawn.randrange(1, 4096))  # in the middle of the answer
    connection.close()


def post(url: str, body: bytes) -> tuple[int, str]:
    """Return the status and the body of an answer."""
    connection = connect(url)
    headers = {"Content-Type": "application/json"}
    try:
        # It may be refused before all of it was sent; then the answer tells.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def connect(url: str) -> HTTPConnection:
    """Return a connection of its own."""
    parts = urlparse(url)
    assert parts.hostname is not None
    return HTTPConnection(parts.hostname, parts.port, timeout=WAIT_S)


def get_json(url: str, path: str) -> Any:
    """Return what a path answers."""
    with urllib.request.urlopen(url + path, timeout=WAIT_S) as response:
        return json.loads(response.read())


def wait_ready(url: str, process: "subprocess.Popen[str]") -> None:
    """Wait until the model is loaded."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            get_json(url, "/health")
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    sys.exit("the server did not begin")


def wait_idle(url: str) -> None:
    """Wait until no request runs or waits."""
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        if all(slot["state"] in ("kept", "saved") for slot in get_json(url, "/slots")):
            return
        time.sleep(0.2)
    sys.exit("requests that were hung up did not end")


def memory_mib(pid: int, url: str) -> int:
    """Return the memory that the server has once it is idle, in MiB."""
    wait_idle(url)
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


if __name__ == "__main__":
    main()
