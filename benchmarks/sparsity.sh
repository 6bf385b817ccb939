#!/usr/bin/env bash
# What streaming heads cost: answers and predictions against the share of heads that keep all
# tokens, and the sentence off the theme (Figure 7) beside methods that drop tokens.
# Run it where nothing else runs; stopped, it goes on where it was. Patterns and results go to OUT;
# a pattern that is there already is not searched for again.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out"

find_heads() { # name of the pattern, options
    local path="$out/heads-$1.json"
    shift
    [ -e "$path" ] || "$python" -m headinfer.cli.main heads --device cpu --dtype float32 \
        --output "$path" "$@"
}
figure7() { # name of the result, options
    local path="$out/evaluate-sparse-$1.json"
    shift
    "$python" -m headinfer.cli.main evaluate figure7 --device cpu --dtype float32 --contexts 2K \
        --sink-tokens 64 --recent-tokens 256 --resume --json "$path" "$@"
}

find_heads smollm2-repetition --model smollm2
find_heads smollm2-copy --model smollm2 --method copy
find_heads smollm2-gates --model smollm2 --optimise --steps 40 --tokens 512 \
    --sink-tokens 16 --recent-tokens 64
find_heads gemma3-repetition --model gemma3-270m --tokens 1K --samples 1
find_heads demo-repetition --model demo --tokens 1K

"$python" benchmarks/sparsity.py smollm2 "$out"/heads-smollm2-{repetition,copy,gates}.json \
    random:0 --json "$out/sparsity-smollm2.json"
"$python" benchmarks/sparsity.py smollm2 random:1 random:2 --shares 0.5 0.25 \
    --json "$out/sparsity-smollm2.json"
# Three layers of Gemma attend all tokens, with one KV head each.
"$python" benchmarks/sparsity.py gemma3-270m "$out/heads-gemma3-repetition.json" random:0 \
    --shares 0.34 0.67 --json "$out/sparsity-gemma3.json"

all=standard,head-wise-sparse,streaming-llm,h2o,streaming-llm-25,h2o-25
figure7 demo-figure7 --model demo --methods "standard,headinfer,${all#*,}" --samples 3 \
    --sparsity 0.5 --head-pattern "$out/heads-demo-repetition.json"
figure7 smollm2-figure7-copy-50 --model smollm2 --methods "$all" --samples 1 \
    --sparsity 0.5 --head-pattern "$out/heads-smollm2-copy.json"
figure7 smollm2-figure7-copy-75 --model smollm2 --methods standard,head-wise-sparse --samples 1 \
    --sparsity 0.75 --head-pattern "$out/heads-smollm2-copy.json"
for way in repetition gates; do
    figure7 "smollm2-figure7-$way-50" --model smollm2 --methods head-wise-sparse --samples 1 \
        --sparsity 0.5 --head-pattern "$out/heads-smollm2-$way.json"
done

if [ -z "${OUT:-}" ]; then
    "$python" benchmarks/sparsity_report.py
    "$python" -m headinfer.cli.main evaluate report "$out"/evaluate-*.json
fi
