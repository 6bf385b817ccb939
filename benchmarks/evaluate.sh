#!/usr/bin/env bash
# The results of docs/evaluation.md on a machine without a GPU, in two hours on two cores: two small
# trained models answer needles, RULER and made-up questions under each method, beside stock.
# Run it where nothing else runs; stopped, it goes on where it was.
#   benchmarks/evaluate.sh            all results, and the document
#   benchmarks/evaluate.sh NAME...    these results alone, such as smollm2-needle
# With DEVICE=cuda the results named gpu-* are made instead. Results go to OUT.
# `make evaluate` installs what it needs: the extra `eval`, and both models.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
mkdir -p "$out"

evaluate() { # name of the result, verb, options
    local name="$1"
    shift
    "$python" -m headinfer.cli.main evaluate "$@" --resume \
        --json "$out/evaluate-$name.json"
}
agree() { # name of the result, options
    local name="$1" text=build/prose.txt
    shift
    mkdir -p build
    "$python" -c 'from headinfer.evaluate.prompts.haystack import prose; print(prose(None)[:400_000])' \
        >"$text"
    evaluate "$name" agreement --file "$text" "$@"
}

# The memory of a small card: SmolLM2's weights take 513 MiB in float32, and stock outgrows the rest
# before 2K tokens.
card=(--model smollm2 --dtype float32 --device simulated --device-memory 640MiB --chunk-tokens 512
    --methods standard,chunked-prefill,kv-4bit,head-wise-1,headinfer)
stock_and_ours=(--device cpu --dtype float32 --methods standard,headinfer)
eight_bits=(--model smollm2 --device simulated --dtype float32 --threads 1 --methods
    standard,bounded,headinfer-int8,headinfer-fp8,quantized-hqq-8bit,quantized-fp8,quantized-quanto-4bit)
all_methods=standard,chunked-prefill,kv-4bit,head-wise-1,bounded,headinfer

make_result() {
    case "$1" in
    smollm2-agreement-float32)
        agree "$1" --device cpu --model smollm2 --contexts 1K,8K --dtype float32 --methods "$all_methods" ;;
    smollm2-agreement-bfloat16)
        agree "$1" --device cpu --model smollm2 --contexts 4K --dtype bfloat16 --methods "$all_methods" ;;
    smollm2-needle)
        evaluate "$1" needle --model smollm2 --contexts 1K,2K,4K,8K --depths 7 "${stock_and_ours[@]}" ;;
    smollm2-agreement-8bit) # chunks, for what passes at once attends nothing that was rounded
        agree "$1" "${eight_bits[@]}" --contexts 1K,2K --chunk-tokens 128 ;;
    smollm2-needle-8bit)
        evaluate "$1" needle "${eight_bits[@]}" --contexts 1K --depths 3 --chunk-tokens 512 ;;
    smollm2-ruler)
        evaluate "$1" ruler --model smollm2 --contexts 1K,2K,4K,8K --samples 2 "${stock_and_ours[@]}" ;;
    smollm2-needle-card)
        evaluate "$1" needle "${card[@]}" --contexts 1K,2K,4K --depths 5 ;;
    smollm2-ruler-card)
        evaluate "$1" ruler "${card[@]}" --contexts 2K,4K --samples 1 ;;
    smollm2-longbench-v2-card)
        evaluate "$1" longbench-v2 "${card[@]}" --contexts 4K --samples 8 --data made \
            --begin-answers ;;
    smollm2-scbench-card)
        evaluate "$1" scbench "${card[@]}" --contexts 4K --samples 1 --data made ;;
    gemma3-agreement)
        agree "$1" --device cpu --model gemma3-270m --contexts 4K,16K --dtype float32 \
            --methods standard,headinfer ;;
    gemma3-needle)
        evaluate "$1" needle --model gemma3-270m --contexts 1K,4K,16K --depths 3 "${stock_and_ours[@]}" ;;
    gemma3-needle-32K) # ten minutes for stock's one answer
        evaluate "$1" needle --model gemma3-270m --contexts 32K --depths 0.5 "${stock_and_ours[@]}" ;;
    gemma3-ruler)
        evaluate "$1" ruler --model gemma3-270m --contexts 4K --samples 1 "${stock_and_ours[@]}" ;;
    gpu-smollm2-agreement-float32)
        agree "$1" --device cuda --model smollm2 --contexts 1K,8K --dtype float32 \
            --methods "$all_methods,transformers-offloaded" ;;
    gpu-smollm2-agreement-bfloat16)
        agree "$1" --device cuda --model smollm2 --contexts 1K,8K --dtype bfloat16 \
            --methods "$all_methods,transformers-offloaded" ;;
    gpu-smollm2-needle)
        evaluate "$1" needle --device cuda --model smollm2 --contexts 1K,2K,4K,8K --depths 11 \
            --samples 2 --dtype bfloat16 --methods standard,transformers-offloaded,kv-4bit,head-wise-1,headinfer ;;
    gpu-smollm2-needle-float32)
        evaluate "$1" needle --device cuda --model smollm2 --contexts 1K,2K,4K,8K --depths 11 \
            --dtype float32 --methods standard,headinfer ;;
    gpu-smollm2-ruler)
        evaluate "$1" ruler --device cuda --model smollm2 --contexts 1K,2K,4K,8K --samples 4 \
            --dtype bfloat16 --methods standard,head-wise-1,headinfer ;;
    gpu-gemma3-ruler) # on two cores these take stock in chunks an hour and more
        evaluate "$1" ruler --device cuda --model gemma3-270m --contexts 4K,16K,32K --samples 1 \
            --dtype float32 --methods standard,headinfer ;;
    *)
        echo "there is no result $1; $0 names them" >&2
        exit 2 ;;
    esac
}

if [ $# -gt 0 ]; then
    names=("$@")
elif [ "${DEVICE:-cpu}" = cuda ]; then
    names=(gpu-smollm2-{agreement-float32,agreement-bfloat16,needle,needle-float32,ruler}
        gpu-gemma3-ruler)
else
    names=(smollm2-{agreement-float32,agreement-bfloat16,agreement-8bit,needle,needle-8bit,ruler}
        smollm2-{needle,ruler,longbench-v2,scbench}-card gemma3-{needle,needle-32K,agreement,ruler})
fi
failed=0
for name in "${names[@]}"; do
    status=0
    make_result "$name" || status=$?
    [ "$status" -lt 128 ] || exit "$status" # stopped by a person
    [ "$status" -eq 0 ] || { echo "$name: ended with status $status" >&2; failed=1; }
done
if [ $# -eq 0 ] && [ -z "${OUT:-}" ]; then
    "$python" -m headinfer.cli.main evaluate report "$out"/evaluate-*.json
fi
exit "$failed"
