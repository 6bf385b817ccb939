#!/usr/bin/env bash
# Two GPUs of one host: one of them, layers spread over both, and heads split over both, with random
# weights of the shapes of Llama-3-8B (held to 24 GiB a card) and of Llama-3-70B in bfloat16.
#   benchmarks/gpu2.sh PART...    some parts; without one they are listed
# A part ends after BUDGET_S seconds (145) and is continued when it is run again. Its machine needs
# torch, transformers and accelerate; nothing is installed. Results are kept in FOLDER (build/gpu2)
# and copied to OUT (benchmarks/results) after each part.
# A file holds the rows of one commit: with SUFFIX, such as -800K, others get files of their own.
# On a copy of the tree without its history, HEADINFER_COMMIT names the commit.
# TINY=1 tries all of this on a CPU, with a tiny shape and simulated GPUs.
set -uo pipefail
cd "$(dirname "$0")/.."
# Multicast over NVLink is not allowed everywhere.
export PYTHONPATH=src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 NCCL_NVLS_ENABLE=0
export TORCH_CPP_LOG_LEVEL=ERROR
python="${PYTHON:-python3}"
kept=benchmarks/results
[ -n "${TINY:-}" ] && kept=build/gpu2-tiny # never over what was measured
folder="${FOLDER:-build/gpu2}${TINY:+-tiny}"
out="${OUT:-$kept}"
mkdir -p "$folder" "$out"
parts=(8b-decode-100K 8b-decode-400K 8b-decode-800K 8b-prefill 70b-decode-10K 70b-decode-100K
    70b-decode-400K 70b-host 70b-prefill 70b-longest)

small=(--device cuda --model llama-3-8b --dummy-weights --device-memory 24GiB)
large=(--device cuda --model llama-3-70b --dummy-weights)
scale() { echo "$1"; }
if [ -n "${TINY:-}" ]; then
    export OMP_NUM_THREADS=1
    small=(--device simulated --layers 2 --hidden-size 64 --heads 4 --kv-heads 2 --head-dim 16
        --vocab-size 96)
    large=("${small[@]}")
    scale() { echo "${1%K}"; } # as many tokens as there would be thousands
fi

bench() { # name of the result, verb, options
    local name="$1" verb="$2"
    shift 2
    timeout --signal=INT --kill-after=15 "${BUDGET_S:-145}" \
        "$python" -m headinfer.cli.main bench "$verb" --gpus 2 --time-limit 140 "$@" \
        --resume --json "$folder/gpu2-$name${SUFFIX:-}.json" 2>&1 | tee -a "$folder/gpu2.log"
}
decode() { # name of the result, contexts, methods, options
    local name="$1" contexts methods="$3"
    contexts="$(scale "$2")"
    shift 3
    bench "$name" decode "$@" --contexts "$contexts" --methods "$methods" --fill random \
        --new-tokens 12
}
both=one,layers,heads,one-host,layers-host,heads-host

run_part() {
    case "$1" in
    8b-decode-*) decode 8b "${1##*-}" "$both" "${small[@]}" ;;
    8b-prefill)
        bench 8b-prefill prefill "${small[@]}" --contexts "$(scale 100K)" --methods one,layers,heads ;;
    70b-decode-*) decode 70b "${1##*-}" layers,heads "${large[@]}" ;;
    70b-host) decode 70b-host 100K layers-host,heads-host "${large[@]}" ;;
    70b-prefill)
        bench 70b-prefill prefill "${large[@]}" --contexts "$(scale 100K)" --methods layers,heads ;;
    70b-longest)
        bench 70b-longest max-context "${large[@]}" --contexts "$(scale 8K),$(scale 128K)" \
            --fill random --methods standard ;;
    *) echo "there is no part $1; the parts are: ${parts[*]}" >&2; exit 2 ;;
    esac
}

if [ $# -eq 0 ]; then
    echo "the parts are: ${parts[*]}"
    exit 2
fi
probed="${TMPDIR:-/tmp}/headinfer-gpu2-probed-$(id -u)"
if [ -z "${TINY:-}" ] && [ ! -e "$probed" ]; then # the CPU's share is chosen by it
    timeout 90 "$python" -m headinfer.cli.main probe --quick --json "$folder/probe.json" &&
        touch "$probed"
fi
for part in "$@"; do
    run_part "$part"
    cp "$folder"/gpu2-*.json "$out/"
done

"$python" - "$folder"/gpu2-*.json <<'P'
import json
import sys

for path in sys.argv[1:]:
    with open(path) as file:
        result = json.load(file)
    if "rows" not in result:
        continue
    name = "prefill_s" if result["header"]["command"] == "prefill" else "decode_s_per_token"
    alone = {row["context_tokens"]: row[name] for row in result["rows"] if row["method"] == "one"}
    print(path)
    for row in result["rows"]:
        seconds, tokens = row[name], row["context_tokens"]
        words = row["status"] + (f": {row['reason'][:90]}" if row["reason"] else "")
        if seconds is None:
            print(f"  {row['method']:12} {tokens // 1024:5}K  {words}")
            continue
        of_one = f"{seconds / alone[tokens]:.2f}" if alone.get(tokens) else "-"
        resident = [part["resident_tokens"] for part in row["parts"]]
        print(
            f"  {row['method']:12} {tokens // 1024:5}K {seconds:9.4f} s, of one {of_one:>5}, bound "
            f"{row['bound_s']:.4f} s ({row['bound_fraction']:.0%}) by {row['bound_by']}, "
            f"resident {resident or (row['plan'] or {}).get('resident_tokens')}, "
            f"{row['plan'] and row['plan'].get('host_attended_percent')}% by the CPU; {words}"
        )
P
