"""Write the README's table of measured speed from the results in this folder.

Run `python benchmarks/readme_table.py` after a new result; `--check` only compares.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
MIB = 2**20


def table(documents: list[dict[str, Any]]) -> str:
    """Return the table of all decode results, with the conditions they share."""
    header = documents[0]["header"]
    model, hardware, versions = header["model"], header["hardware"], header["versions"]
    lines = [
        f"{model['layers']} layers, hidden {model['hidden_size']}, {model['heads']} query heads, "
        f"{model['kv_heads']} KV heads of {model['head_dim']}, random weights; {hardware['cpu']}, "
        f"{hardware['cpu_threads']} threads; torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Standard is `DynamicCache` with sdpa, in the same run.",
        "",
        "| dtype | context | method | prefill | decode, a token | x standard | bound "
        "| memory growth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for document in documents:
        for row in document["rows"]:
            lines.append(
                f"| {row['dtype']} | {row['context_tokens'] // 1024}K | {row['method']} "
                f"| {row['prefill_s']:.0f} s | {row['decode_s_per_token'] * 1000:.1f} ms "
                f"| {row['decode_x_standard']:.1f} | {row['decode_bound_s'] * 1000:.1f} ms "
                f"| {row['peak_rss_growth_bytes'] / MIB:.0f} MiB |"
            )
    rates = " and ".join(
        f"{document['header']['rates']['host_bytes_per_s'] / 1e9:.0f}" for document in documents
    )
    lines += [
        "",
        "The bound is reading KV cache and weights once, at the read rate measured in the same run "
        f"({rates} GB/s). From [benchmarks/results](benchmarks/README.md); "
        "`make bench` repeats it.",
    ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    """Return the README with the table between its marks."""
    paths = sorted(RESULTS.glob("cpu-decode-*.json"))
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    documents = [json.loads(path.read_text()) for path in paths]
    return f"{before}{BEGIN}\n{table(documents)}\n{END}{after}"


def main() -> None:
    """Rewrite the README, or fail if it is not up to date."""
    readme = README.read_text()
    wanted = updated(readme)
    if "--check" in sys.argv[1:]:
        sys.exit(None if readme == wanted else "README.md differs from benchmarks/results")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
