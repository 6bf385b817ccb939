#!/usr/bin/env bash
# The paper's Table 4: Llama-3-70B's shape in bfloat16 with random weights, on eight GPUs of one host
# held to 24 GiB each, or on four held to 48 GiB; and Llama-3-8B's shape at millions of tokens on one.
#   benchmarks/gpu8.sh PART...            some parts, on eight GPUs; without one they are listed
#   GPUS=4 benchmarks/gpu8.sh PART...     the same on four
# Llama-3-8B at 4M tokens takes 512 GiB of CPU memory; 8b-3500K is for hosts that lack them.
#   GPUS=1 benchmarks/gpu8.sh 70b-4bit    Llama-3-70B's shape in 4 bits, on one GPU held to 48 GiB
# The last needs bitsandbytes, whose wheel may lie in build/wheels.
# gpus.sh says what BUDGET_S (450), FOLDER, OUT, SUFFIX, TINY and DRY do.
set -uo pipefail
gpus="${GPUS:-8}"
case "$gpus" in
8) card=24GiB ;;
4 | 1) card=48GiB ;;
*) echo "GPUS is 8, 4 or 1, not $gpus" >&2; exit 2 ;;
esac
name="gpu${gpus}" default_budget_s=450
parts=(plan 70b-decode-10K 70b-decode-100K 70b-decode-400K 70b-longest-10K 70b-longest-5K
    70b-decode-longest 70b-prefill-100K 70b-prefill-400K 70b-standard 8b-2M 8b-3500K 8b-4M)
[ "$gpus" = 1 ] && parts=(70b-4bit)
. "$(dirname "$0")/gpus.sh"

large=(--device cuda --model llama-3-70b --dummy-weights --device-memory "$card")
small=(--device cuda --model llama-3-8b --dummy-weights --device-memory 24GiB)
if [ -n "${TINY:-}" ]; then
    large=(--device simulated --layers "$gpus" --hidden-size 64 --heads "$gpus" --kv-heads "$gpus"
        --head-dim 16 --vocab-size 96)
    small=("${large[@]}")
fi
splits=layers,heads
planned=(plan --model llama-3-70b --gpus "$gpus" --device-memory "$card" --hardware "$machine")

four_bits() { # contexts
    local tiny=()
    [ -n "${TINY:-}" ] && tiny=(--tiny)
    if [ -z "${DRY:-}" ] && ! "$python" -c "import bitsandbytes" 2>/dev/null; then
        "$python" -m zipfile -e build/wheels/bitsandbytes-*.whl build/wheels/site &&
            export PYTHONPATH="$PYTHONPATH:build/wheels/site"
    fi
    run "$python" benchmarks/four_bits.py "${tiny[@]}" --contexts "$(scale "$1")" \
        --device-memory 48GiB --resume --json "$folder/$name-70b-4bit${SUFFIX:-}.json"
}

find_longest() { # tokens of a chunk
    local tokens
    tokens="$(longest --chunk-tokens "$1")"
    bench "70b-longest-$1" max-context "${large[@]}" --chunk-tokens "$(scale "$1")" --fill random \
        --methods "$splits" --contexts "$tokens,$((tokens * 17 / 16))"
}

run_part() {
    case "$1" in
    plan) run "$python" -m headinfer.cli.main "${planned[@]}" --chunk-tokens 10K --context 400K ;;
    70b-decode-longest)
        decode 70b "$(longest --chunk-tokens 10K)" "$splits" "${large[@]}" \
            --chunk-tokens "$(scale 10K)"
        ;;
    70b-decode-*)
        decode 70b "${1##*-}" "$splits" "${large[@]}" --chunk-tokens "$(scale 10K)" ;;
    70b-longest-*) find_longest "${1##*-}" ;;
    70b-prefill-*)
        bench 70b-prefill prefill "${large[@]}" --chunk-tokens "$(scale 10K)" \
            --contexts "$(scale "${1##*-}")" --methods "$splits" ;;
    70b-standard)
        bench 70b-standard max-context "${large[@]}" --contexts "$(scale 8K),$(scale 32K)" \
            --fill random --methods standard ;;
    70b-4bit)
        [ "$gpus" = 1 ] || no_part "$1, but with GPUS=1"
        four_bits 10K,100K,200K,300K
        ;;
    8b-2M) decode 8b 2M one,one-host "${small[@]}" ;;
    8b-3500K) decode 8b 3584K one,one-host "${small[@]}" ;;
    8b-4M) decode 8b 4M one,one-host "${small[@]}" ;;
    *) no_part "$1" ;;
    esac
}

run_parts "$@"
