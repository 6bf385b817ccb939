#!/usr/bin/env bash
# Two GPUs of one host: one of them, layers spread over both, and heads split over both, with random
# weights of the shapes of Llama-3-8B (held to 24 GiB a card) and of Llama-3-70B in bfloat16.
#   benchmarks/gpu2.sh PART...    some parts; without one they are listed
# gpus.sh says what BUDGET_S (145), FOLDER, OUT, SUFFIX, TINY and DRY do.
set -uo pipefail
name=gpu2 gpus=2 default_budget_s=145
parts=(8b-decode-100K 8b-decode-400K 8b-decode-800K 8b-prefill 70b-decode-10K 70b-decode-100K
    70b-decode-400K 70b-decode-longest 70b-host 70b-prefill 70b-longest)
. "$(dirname "$0")/gpus.sh"

small=(--device cuda --model llama-3-8b --dummy-weights --device-memory 24GiB)
large=(--device cuda --model llama-3-70b --dummy-weights)
if [ -n "${TINY:-}" ]; then
    small=(--device simulated --layers 2 --hidden-size 64 --heads 4 --kv-heads 2 --head-dim 16
        --vocab-size 96)
    large=("${small[@]}")
fi
planned=(plan --model llama-3-70b --gpus 2 --hardware "$machine")
both=one,layers,heads,one-host,layers-host,heads-host

run_part() {
    case "$1" in
    8b-decode-*) decode 8b "${1##*-}" "$both" "${small[@]}" ;;
    8b-prefill)
        bench 8b-prefill prefill "${small[@]}" --contexts "$(scale 100K)" --methods one,layers,heads ;;
    70b-decode-longest) decode 70b "$(longest)" layers,heads "${large[@]}" ;;
    70b-decode-*) decode 70b "${1##*-}" layers,heads "${large[@]}" ;;
    70b-host) decode 70b-host 100K layers-host,heads-host "${large[@]}" ;;
    70b-prefill)
        bench 70b-prefill prefill "${large[@]}" --contexts "$(scale 100K)" --methods layers,heads ;;
    70b-longest)
        bench 70b-longest max-context "${large[@]}" --contexts "$(scale 24K),$(scale 32K)" \
            --fill random --methods standard ;;
    *) no_part "$1" ;;
    esac
}

run_parts "$@"
