"""Build the demo model, or measure how well it retrieves."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from headinfer.demo.build import build_model, ensure_model
from headinfer.demo.document import make_document


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb of the command line."""
    parser = argparse.ArgumentParser(prog="python -m headinfer.demo", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="write the model and its tokenizer to a folder")
    build.add_argument("folder", type=Path)
    build.add_argument(
        "--ungrouped",
        action="store_true",
        help="a KV head for each query head: two of the eight then look near alone",
    )
    measure = verbs.add_parser(
        "evaluate", help="ask all questions of some documents under stock attention"
    )
    measure.add_argument(
        "--model", type=Path, help="folder of the model; default: the one in the user's cache"
    )
    measure.add_argument("--tokens", type=int, default=4096, help="tokens of a prompt")
    measure.add_argument(
        "--documents", type=int, default=1, help="number of documents, eight questions each"
    )
    measure.add_argument("--attn", default="sdpa", help="attention implementation of transformers")
    measure.add_argument("--dtype", default="float32", help="dtype of weights and cache")
    measure.add_argument("--device", default="cpu", help="device of torch")
    measure.add_argument(
        "--chunk", type=int, help="tokens of a prefill chunk; default: the whole document at once"
    )
    measure.add_argument("--seed", type=int, default=0, help="seed of the first document")
    measure.add_argument(
        "--cloze", action="store_true", help="complete a sentence in place of a chat"
    )
    options = parser.parse_args(arguments)
    if options.verb == "build":
        build_model(options.folder, ungrouped=options.ungrouped)
    else:
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    """Evaluate on one document after another and print a table row for each."""
    from transformers import AutoTokenizer

    from headinfer.demo.evaluate import evaluate
    from headinfer.integration.checkpoint import load_checkpoint

    folder = options.model or ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, note = load_checkpoint(
        str(folder), str(folder), dtype=options.dtype, attn_implementation=options.attn
    )
    model.to(options.device).eval()
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"attention {options.attn}, {options.dtype}, {options.device},"
        f" prefill {f'in chunks of {options.chunk}' if options.chunk else 'in one piece'}"
    )
    print("  seed  tokens  right  prefill s  answers s", flush=True)
    right = asked = 0
    for seed in range(options.seed, options.seed + options.documents):
        document = make_document(options.tokens, seed)
        result = evaluate(
            model, tokenizer, [document], chunk_tokens=options.chunk, cloze=options.cloze
        )
        right, asked = right + result.num_right, asked + len(result.answers)
        print(
            f"{seed:6d} {result.prompt_tokens:7d} {result.num_right:3d}/{len(result.answers):<2d}"
            f" {result.prefill_s[0]:10.1f} {result.answer_s[0]:10.1f}",
            flush=True,
        )
    print(f"right: {right} of {asked} = {right / asked:.2%}")


if __name__ == "__main__":
    main()
