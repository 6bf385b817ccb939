#!/usr/bin/env bash
# The results of a machine without a GPU, in a quarter of an hour on two cores: prefill, decode and
# memory from 1K to 128K tokens beside transformers' own caches, on a shape small enough that the
# slowest finishes. For a row of the 4-bit cache: pip install optimum optimum-quanto.
# Run it where nothing else runs; stopped, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src
python="${PYTHON:-python3}"
out=benchmarks/results
shape=(--device cpu --layers 2 --hidden-size 512 --heads 8 --kv-heads 4 --head-dim 64)
stock=standard,chunked-prefill,transformers-offloaded,kv-4bit
ours=head-wise-8,head-wise-4,head-wise-1,bounded,resident,host-attention,headinfer
bench() { # verb, options
    local verb="$1"
    shift
    "$python" -m headinfer.cli.main bench "$verb" "${shape[@]}" --resume \
        --json "$out/cpu-suite-$verb.json" "$@"
}

bench prefill --contexts 1K,4K,16K,32K --methods "$stock,$ours"
bench decode --contexts 1K,4K,16K,64K,128K --fill random --new-tokens 16 --methods "$stock,$ours"
bench memory --contexts 4K,32K,64K,128K --methods "$stock,bounded,headinfer"
bench max-context --contexts 4K,512K --fill random --device-memory 600MiB \
    --methods standard,chunked-prefill,headinfer
mapfile -t results < <(ls "$out"/*-suite-*.json "$out"/gpu-{captured,1M}.json \
    "$out"/gpu-{sparse,longest}*.json "$out"/gpu2-*.json 2>/dev/null)
"$python" -m headinfer.cli.main bench report "${results[@]}"
