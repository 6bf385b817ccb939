"""What drafts gain a real model whose KV cache is the bound, end to end, by the clock.

    python benchmarks/draft_gain.py --device cuda --device-memory 1GiB --json draft-gain.json

A small trained model reads this repository's code, and its documents, far beyond the length that it
was trained for: its rotary positions are scaled (YaRN). GPU memory is held to a part of the KV. The
model goes on greedily, without drafts and with each number of them, each from a prefill of its own.
The times are those that a user waits: from the first token to the last, captures included.
"""

import argparse
import time
from typing import Any

from draft_runs import document_of
from draft_texts import TEXTS, text_of
from kept_rows import add_options
from transformers import PreTrainedModel

import headinfer
from headinfer.bench.files import replace_json
from headinfer.cli.load import NamedSource, calm_transformers
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.units import parse_tokens

OFF = "off"


def loaded(given: argparse.Namespace, tokens: int) -> tuple[PreTrainedModel, Any]:
    """Return the model on its device, with positions for `tokens` tokens, and its tokenizer."""
    source = NamedSource(name=given.model)
    config = load_config(source)
    trained = config.max_position_embeddings
    if tokens > trained:
        config.rope_parameters = config.rope_parameters | {
            "rope_type": "yarn",
            "factor": tokens / trained,
            "original_max_position_embeddings": trained,
        }
        config.max_position_embeddings = tokens
    device = "cuda" if given.device == "cuda" else "cpu"
    model, _ = load_model(source, config, dtype=given.dtype, device=device)
    return model, load_tokenizer(source)


def last_tokens(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """Return the last `tokens` tokens of a text, which goes round if it is shorter."""
    ids = tokenizer(text)["input_ids"]
    return (ids * (tokens // len(ids) + 1))[-tokens:]


def answered(
    model: PreTrainedModel, tokenizer: Any, prompt: list[int], given: argparse.Namespace, draft: str
) -> dict[str, Any]:
    """Return what an answer took, and its text."""
    options = {"device": given.device, "device_memory": given.device_memory}
    if given.chunk_tokens:
        options["chunk_tokens"] = given.chunk_tokens
    drafts = {} if draft == OFF else {"draft_tokens": "auto"}
    text, first_s = "", 0.0
    with headinfer.attach(model, **options, **drafts) as offload:
        for record in headinfer.generate(
            *(model, prompt),
            tokenizer=tokenizer,
            draft=draft,
            max_new_tokens=given.new_tokens,
            min_new_tokens=given.new_tokens,
            do_sample=False,
        ):
            text += record.text
            first_s = first_s or time.perf_counter()
        seconds = time.perf_counter() - first_s
        plan, stats = offload.plan, offload.stats
    fields = "prefill_s decode_s capture_s draft_s verify_s verifications accepted_tokens"
    return {
        "draft": draft,
        "seconds": seconds,
        "s_per_token": seconds / (record.tokens - 1),
        **{name: getattr(record, name) for name in fields.split()},
        "peak_device_kv_bytes": record.peak_device_kv_bytes,
        "host_kv_bytes": record.host_kv_bytes,
        "bytes_to_device": stats.bytes_to_device,
        "resident_tokens": plan.resident_tokens,
        "text": text,
    }


def equal_part(text: str, other: str) -> float:
    """Return the share of two texts that is equal before the first difference."""
    longest = max(len(text), len(other), 1)
    same = (a == b for a, b in zip(text, other, strict=False))
    return next((at for at, equal in enumerate(same) if not equal), longest) / longest


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", default="128K", help="of a text")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--drafts", default=f"{OFF},auto,7,15")
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--device", default="cuda", help="cuda, cpu or simulated")
    parser.add_argument("--device-memory", default="1GiB", help="weights included")
    parser.add_argument("--chunk-tokens")
    parser.add_argument("--dtype", default="bfloat16")
    add_options(parser, "answer")
    return parser.parse_args()


def main() -> None:
    """Measure each number of drafts on each text."""
    given = parsed()
    calm_transformers(verbose=False)
    tokens = parse_tokens(given.tokens)
    model, tokenizer = loaded(given, tokens + given.new_tokens)
    document = document_of(given, model.device, but={"texts", "drafts"})
    done = {(row["context"], row["draft"]): row for row in document["rows"]}
    for name in given.texts.split(","):
        prompt = last_tokens(tokenizer, text_of(name), tokens)
        alone: dict[str, Any] = {}
        for draft in given.drafts.split(","):
            if (name, draft) in done:
                alone = alone or done[name, draft]
                continue
            row = {"context": name, "tokens": tokens} | answered(
                model, tokenizer, prompt, given, draft
            )
            alone = alone or row
            row["of_the_first"] = row["seconds"] / alone["seconds"]
            row["equal_part"] = equal_part(row["text"], alone["text"])
            document["rows"].append(row)
            replace_json(given.json, document, remedy="make room, then give the command again")
            told = {key: row[key] for key in ("context", "draft", "s_per_token", "of_the_first")}
            accepted = row["accepted_tokens"] / max(row["verifications"], 1)
            print(told | {"accepted": round(accepted, 2), "equal_part": row["equal_part"]})


if __name__ == "__main__":
    main()
