#!/usr/bin/env bash
# Everything that needs a CUDA device, in one run: the tests marked gpu, then Llama-3-8B's shape with
# random weights under a 24 GiB cap, then a smaller shape. Results go to $OUT, a summary comes last.
# PYTHON must have torch, transformers and pytest; nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out"
bench() { "$python" -m headinfer.cli.main bench "$@" 2>&1 | tee -a "$out/gpu.log"; }

"$python" -m pytest -m gpu -q --no-header -p no:cacheprovider tests 2>&1 | tee "$out/gpu-tests.log"

llama=(--device cuda --device-memory 24GiB --dtype bfloat16 --layers 32 --hidden-size 4096 --heads 32
    --kv-heads 8 --head-dim 128 --intermediate-size 14336 --vocab-size 128256)
for context in 10K 40K 100K; do
    bench decode --context "$context" "${llama[@]}" --json "$out/gpu-llama-3-8b-$context.json"
    bench decode --context "$context" "${llama[@]}" --methods headinfer --tile-heads 1 \
        --tile-tokens all --json "$out/gpu-llama-3-8b-$context-head-1.json"
done
bench decode --context 128K --device cuda --dtype bfloat16 --json "$out/gpu-small-128K.json"

tail -n 3 "$out/gpu-tests.log"
grep -E "standard|headinfer|matches" "$out/gpu.log" | tail -n 24
