# What gpu2.sh and gpu8.sh share; they source it. It is no program of its own.
#
# Before it `name` is set (results are $name-*.json), `gpus`, and `parts`; `run_part PART` is defined
# there, and `planned`, which `longest` plans by for the machine HARDWARE (this). A part ends after
# BUDGET_S seconds and is continued when it is run again. Its machine needs torch, transformers and
# accelerate; nothing is installed. Results are kept in FOLDER (build/$name) and copied to OUT
# (benchmarks/results) after each part.
# A file holds the rows of one commit: with SUFFIX, such as -800K, others get files of their own.
# On a copy of the tree without its history, HEADINFER_COMMIT names the commit.
# TINY=1 tries all of this on a CPU, with a tiny shape and simulated GPUs. DRY=1 prints the commands.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Multicast over NVLink is not allowed everywhere.
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export NCCL_NVLS_ENABLE=0 TORCH_CPP_LOG_LEVEL=ERROR
. benchmarks/probed.sh
python="${PYTHON:-python3}"
kept=benchmarks/results
[ -n "${TINY:-}" ] && kept="build/$name-tiny" # never over what was measured
folder="${FOLDER:-build/$name}${TINY:+-tiny}"
out="${OUT:-$kept}"
budget_s="${BUDGET_S:-$default_budget_s}"
machine="${HARDWARE:-this}" # as `probe` measured it

if [ -n "${TINY:-}" ]; then
    export OMP_NUM_THREADS=1
fi

scale() { # tokens: as many as there would be thousands, in a trial
    if [ -n "${TINY:-}" ]; then echo "${1//[KM]/}"; else echo "$1"; fi
}

headinfer() { "$python" -m headinfer.cli.main "$@"; }

longest() { # options of the plan: the longest context that host memory holds by either split
    if [ -n "${TINY:-}" ]; then
        echo 96
        return
    fi
    headinfer "${planned[@]}" "$@" --context 100K --json - | "$python" -c '
import json, sys
plans = json.load(sys.stdin)["plans"]
most = [plan["max_context_tokens"] for plan in plans
        if plan["method"] == "resident" and plan["split"] != "none"]
print(min(most) * 31 // 32 // 1024 * 1024)  # what is free is less than all that there is
'
}

run() { # a command, for as long as a part may take
    if [ -n "${DRY:-}" ]; then
        echo "$@"
        return
    fi
    timeout --signal=INT --kill-after=15 "$budget_s" "$@" 2>&1 | tee -a "$folder/$name.log"
}

bench() { # name of the result, verb, options
    local result="$1" verb="$2"
    shift 2
    run "$python" -m headinfer.cli.main bench "$verb" --gpus "$gpus" \
        --time-limit "$((budget_s - 5))" "$@" --resume \
        --json "$folder/$name-$result${SUFFIX:-}.json"
}

decode() { # name of the result, contexts, methods, options
    local result="$1" contexts methods="$3"
    contexts="$(scale "$2")"
    shift 3
    bench "$result" decode "$@" --contexts "$contexts" --methods "$methods" --fill random \
        --new-tokens 12
}

summary() { # result files
    "$python" - "$@" <<'P'
import json
import sys

for path in sys.argv[1:]:
    with open(path) as file:
        result = json.load(file)
    if "command" not in result.get("header", {}):
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
}

copy_results() {
    local result
    for result in "$folder/$name"-*.json; do
        [ -e "$result" ] && [ ! "$folder" -ef "$out" ] && cp "$result" "$out/"
    done
}

run_parts() { # parts
    if [ $# -eq 0 ]; then
        echo "the parts are: ${parts[*]}"
        exit 2
    fi
    mkdir -p "$folder" "$out"
    [ -n "${TINY:-}${DRY:-}" ] || probe_once "$name" "$folder/probe.json"
    for part in "$@"; do
        run_part "$part"
        [ -n "${DRY:-}" ] || copy_results
    done
    [ -n "${DRY:-}" ] || summary $(ls "$folder/$name"-*.json 2>/dev/null)
}

no_part() { # a part that there is not
    echo "there is no part $1; the parts are: ${parts[*]}" >&2
    exit 2
}
