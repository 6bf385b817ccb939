"""Write the README's tables of measured speed from the results in this folder.

Run `python benchmarks/readme_table.py` after a new result; `--check` only compares.
"""

import json
from pathlib import Path
from typing import Any

from marked_tables import between_marks, write

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
MIB = 2**20
LEAST_TO_COMPARE = 2
_SHORT_MS = 30
"""Below it a tenth of a millisecond is worth telling."""
GPU_METHODS = {
    "standard": "standard",
    "standard-compiled": "static cache, compiled",
    "head-wise-1": "head=1 (the paper)",
    "resident": "resident",
    "host-attention": "+ host attention",
}
BOUNDED_METHODS = {"head-wise-1": "head=1", "resident": "resident", "host-attention": "+ host"}
"""Whose share of the physical bound is told."""


def table(documents: list[dict[str, Any]]) -> str:
    """Return the table of all decode results, with the conditions they share."""
    header = documents[0]["header"]
    model, hardware, versions = header["model"], header["hardware"], header["versions"]
    lines = [
        f"{model['layers']} layers, hidden {model['hidden_size']}, {model['heads']} query heads, "
        f"{model['kv_heads']} KV heads of {model['head_dim']}, random weights. {hardware['cpu']}, "
        f"{hardware['cpu_threads']} threads. Torch {versions['torch']}, transformers "
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


def gpu_table(documents: list[dict[str, Any]]) -> str:
    """Return milliseconds a token of each method on a GPU, one line a context."""
    header = documents[0]["header"]
    hardware, versions, rates = header["hardware"], header["versions"], header["rates"]
    rows = {
        (row["context_tokens"], row["method"]): row
        for document in reversed(documents)  # the first counts where several have a row
        for row in document["rows"]
    }
    names = ", ".join(BOUNDED_METHODS.values())
    lines = [
        f"{header['model']['description']}. {hardware['gpu']} held to "
        f"{header['settings']['device_memory']}, link {rates['link_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"{hardware['cpu_threads']} CPU threads. Torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Milliseconds a token, behind a cache filled at random. "
        "`make bench-gpu` repeats it. [benchmarks/](benchmarks/README.md) says why standard takes "
        "so long, and what these results lack.",
        prefills(),
        "",
        f"| context | KV | {' | '.join(GPU_METHODS.values())} | share of the bound: {names} |",
        "|---" * (len(GPU_METHODS) + 3) + "|",
    ]
    for tokens in sorted({tokens for tokens, _ in rows}):
        at = {method: rows[tokens, method] for method in GPU_METHODS if (tokens, method) in rows}
        if sum(row["status"] == "ok" for row in at.values()) < LEAST_TO_COMPARE:
            continue
        kv_gib = next(iter(at.values()))["kv_bytes"] / 2**30
        times = [_milliseconds(at.get(method)) for method in GPU_METHODS]
        shares = ", ".join(_share(at.get(method)) for method in BOUNDED_METHODS)
        lines.append(f"| {tokens // 1024}K | {kv_gib:.1f} GiB | {' | '.join(times)} | {shares} |")
    return "\n".join(lines)


def prefills() -> str:
    """Return how long prefills took with nothing resident, beside stock with all on the device."""
    ours, stock = (
        {
            row["context_tokens"]: row["prefill_s"]
            for row in json.loads((RESULTS / name).read_text())["rows"]
            if row["method"] == method and row["prefill_s"]
        }
        for name, method in (
            ("gpu-suite-llama-prefill.json", "bounded"),
            ("gpu-suite-llama-prefill-72GiB.json", "chunked-prefill"),
        )
    )
    pairs = " ".join(
        f"{tokens // 1024}K tokens: {ours[tokens]:.2f} s, stock {stock[tokens]:.2f} s."
        for tokens in sorted(ours.keys() & stock.keys())
    )
    return (
        "Prefill with no KV resident, beside stock in chunks with all KV in GPU memory (72 GiB). "
        f"{pairs} {longest()}"
    )


def longest() -> str:
    """Return the longest contexts that ran."""
    document = json.loads((RESULTS / "gpu-suite-llama-max-context.json").read_text())
    header = document["header"]
    host_gib = header["hardware"]["host_memory_bytes"] / 2**30
    found = ", ".join(
        f"{GPU_METHODS.get(row['method'], row['method'])} {row['context_tokens'] // 1024}K"
        for row in document["rows"]
    )
    return (
        f"Longest context in {header['settings']['device_memory']} of GPU and {host_gib:.0f} GiB "
        f"of CPU memory: {found}."
    )


def _share(row: dict[str, Any] | None) -> str:
    fraction = (row or {}).get("bound_fraction")
    return "-" if fraction is None else f"{fraction:.0%}"


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["status"] != "ok":
        return "out of memory" if "memory" in row["reason"] else row["status"]
    milliseconds = row["decode_s_per_token"] * 1000
    return f"{milliseconds:.1f}" if milliseconds < _SHORT_MS else f"{milliseconds:.0f}"


def updated(readme: str) -> str:
    """Return the README with each table between its marks."""
    for name, files, make in (
        ("table", [path.stem for path in sorted(RESULTS.glob("cpu-decode-*.json"))], table),
        ("gpu table", ("gpu-captured", "gpu-suite-llama-decode-long", "gpu-1M"), gpu_table),
    ):
        documents = [json.loads((RESULTS / f"{file}.json").read_text()) for file in files]
        if documents:
            readme = between_marks(readme, name, make(documents))
    return readme


def main() -> None:
    """Rewrite the README, or fail if it is not up to date."""
    write({README: updated(README.read_text())})


if __name__ == "__main__":
    main()
