#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests marked gpu, a probe, the kernels of its host, what
# streaming costs the attention of a chunk; then Llama-3-8B's shape with random weights held to 24
# GiB: a trace of the link, decode from 1K to 800K tokens (100 GiB of KV), prefill, also beside all KV
# on the device; then a smaller shape at 1M, and the longest contexts.
#   benchmarks/gpu.sh            all of it
#   benchmarks/gpu.sh PART...    some parts: tests, kernels, trace, or what follows gpu- in the name of
#                                a result, such as first-token
# A machine is probed before its first part, and its memory written once. DRY=1 prints the
# benchmarks' commands and runs nothing.
# Ends itself after BUDGET_S seconds (570); run again with the same OUT it goes on where it was.
# Results go to OUT.
# DISK is a folder on the disk that lies below CPU memory in the runs named disk (/tmp). It needs 15 GiB.
# On a copy of the tree without its history, HEADINFER_COMMIT names the commit.
# PYTHON must have torch, transformers and pytest; nothing is installed.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src:tests PYTHONUNBUFFERED=1
. benchmarks/probed.sh
python="${PYTHON:-python3}"
out="${OUT:-benchmarks/results}"
end=$((SECONDS + ${BUDGET_S:-570}))
wanted=("$@") parts=()
mkdir -p "$out"

left() { echo $((end - SECONDS)); }
disk="${DISK:-/tmp}"
probe() { # also the disk, where it can be
    limit_s=180 probe_once gpu "$out/gpu-probe.json" --disk "$disk" ||
        probe_once gpu "$out/gpu-probe.json"
}
chosen() { # part: whether it is to run
    parts+=("$1")
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]]
}
bench() { # name of the result, verb, options; limit_s: seconds of a trial
    local name="$1" verb="$2"
    shift 2
    chosen "$name" || return
    set -- "$python" -m headinfer.cli.main bench "$verb" --device cuda \
        --time-limit "${limit_s:-240}" "$@" --resume --json "$out/gpu-$name.json"
    if [ -n "${DRY:-}" ]; then
        echo "$@"
        return
    fi
    probe
    [ "$(left)" -gt 30 ] || { echo "no time left for $name; run again"; return; }
    timeout --signal=INT "$(left)" "$@" 2>&1 | tee -a "$out/gpu.log"
}
llama=(--model llama-3-8b --dummy-weights --device-memory 24GiB)
methods=standard,head-wise-8,head-wise-1,resident,host-attention

if chosen tests && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-tests.log" ]; then
    "$python" -c "import xdist" 2>/dev/null && workers=(-n 8) || workers=()
    timeout 240 "$python" -m pytest -m gpu "${workers[@]}" -q --no-header -p no:cacheprovider \
        tests 2>&1 | tee "$out/gpu-tests.log"
fi
if chosen kernels && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-prefill-attention.json" ]; then
    probe
    timeout 90 "$python" benchmarks/host_kernel.py --groups 1,4,8,16 \
        --json "$out/gpu-host-kernel.json" 2>&1 | tee -a "$out/gpu.log"
    timeout 60 "$python" benchmarks/host_kernel.py --groups "" --new-tokens 1,4,8,16 \
        --json "$out/gpu-host-kernel-verify.json" 2>&1 | tee -a "$out/gpu.log"
    timeout 60 "$python" benchmarks/gpu_prefill_attention.py \
        --json "$out/gpu-prefill-attention.json" 2>&1 | tee -a "$out/gpu.log"
fi
if chosen trace && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-trace-100K.json" ]; then
    timeout 120 "$python" benchmarks/gpu_trace.py --folder "$out" 2>&1 | tee -a "$out/gpu.log"
fi
bench suite-llama-decode decode "${llama[@]}" --contexts 1K,10K,40K --fill random --new-tokens 24 \
    --methods "$methods"
# What users pick where all fits, and decode steps with and without captures.
bench captured decode "${llama[@]}" --contexts 1K,10K,40K,100K --fill random --new-tokens 48 \
    --methods standard,standard-compiled,resident,resident-eager,resident-unfused,host-attention
# Residents of an answer in the memory of its prompt's activations, and residents of the prompt alone.
bench answers decode "${llama[@]}" --contexts 64K,100K --fill random --new-tokens 48 \
    --methods resident,resident-fixed,host-attention
# Some steps more: the host's share is judged after 1, 3 and 7 of them.
bench suite-llama-decode-long decode "${llama[@]}" --contexts 100K,200K,400K,800K --fill random \
    --new-tokens 12 --methods "$methods"
# The model drafts, over copies of an eighth of the tokens, and one pass verifies. Acceptance is
# replayed, and then a stated one.
bench drafts decode "${llama[@]}" --contexts 100K,200K,400K,800K --fill random --new-tokens 60 \
    --methods host-attention,drafts --replay benchmarks/results/drafts-acceptance.json
for form in dense packed; do
    part=drafts-4of7
    [ "$form" = dense ] || part+="-$form"
    bench "$part" decode "${llama[@]}" --contexts 100K,200K,400K,800K --fill recorded \
        --kv-cache "$form" --new-tokens 60 --methods host-attention,drafts --replay 4/7
done
# As many drafts as are chosen by themselves at the most, accepted as in draft-leaves.json.
bench drafts-9of15 decode "${llama[@]}" --contexts 100K,200K,400K,800K --fill recorded \
    --new-tokens 100 --methods host-attention,drafts --replay 9/15
# The exponents of real models, as random ones would flatter what packs them. int8 is approximate.
forms=(--fill recorded --kv-cache dense,packed,int8)
bench packed decode "${llama[@]}" "${forms[@]}" --contexts 100K,200K,400K,800K --new-tokens 24 \
    --methods host-attention
bench packed-resident decode "${llama[@]}" "${forms[@]}" --contexts 100K,200K,400K --new-tokens 24 \
    --methods resident
bench packed-resident-800K decode "${llama[@]}" --fill recorded --kv-cache dense,packed \
    --contexts 800K --new-tokens 12 --methods resident
bench packed-prefill prefill "${llama[@]}" --kv-cache dense,packed --contexts 100K --repeats 3 \
    --methods bounded
bench packed-1M decode "${llama[@]}" --fill recorded --kv-cache packed --contexts 1M \
    --new-tokens 12 --methods host-attention
if chosen kernels && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-packed-kernel-verify.json" ]; then
    timeout 60 "$python" benchmarks/packed_kernel.py --dims 128 --groups 1,4,8 \
        --json "$out/gpu-packed-kernel.json" 2>&1 | tee -a "$out/gpu.log"
    timeout 60 "$python" benchmarks/packed_kernel.py --dims 128 --groups 4 --new-tokens 1,4,8,16 \
        --json "$out/gpu-packed-kernel-verify.json" 2>&1 | tee -a "$out/gpu.log"
fi
# 4 GiB of CPU memory for 12.5 GiB of KV: nothing resident first, then what the GPU has room for.
below=(--contexts 100K --fill random --host-memory 4GiB --disk-cache "$disk")
# What the disk sustains right behind a part, whose bound is the best tenth of a second.
plain_reads() { # part
    chosen "$1" && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-$1-reads.json" ] && [ "$(left)" -gt 75 ] || return
    timeout --signal=INT "$(left)" "$python" benchmarks/disk_read.py "$disk" \
        --json "$out/gpu-$1-reads.json" 2>&1 | tee -a "$out/gpu.log"
}
bench disk decode "${llama[@]}" "${below[@]}" --new-tokens 24 --methods bounded
plain_reads disk
bench disk-resident decode "${llama[@]}" "${below[@]}" --new-tokens 24 \
    --methods resident,host-attention
plain_reads disk-resident
bench suite-llama-prefill prefill "${llama[@]}" --contexts 1K,10K,40K,100K \
    --methods standard,chunked-prefill,head-wise-1,bounded,headinfer
if chosen short-prompts && [ -z "${DRY:-}" ] && [ ! -e "$out/gpu-short-prompts.json" ] &&
    [ "$(left)" -gt 75 ]; then
    timeout "$(left)" "$python" benchmarks/short_prompts.py --json "$out/gpu-short-prompts.json" 2>&1 |
        tee -a "$out/gpu.log"
fi
# What a user meets first. Methods take turns in this order, three times: 10 minutes. Then 400K and
# 800K tokens, once: 9 and 5 minutes.
fixed=headinfer-chunk-4K,headinfer-chunk-8K,headinfer-chunk-16K
bench first-token-1K prefill "${llama[@]}" --contexts 1K --repeats 5 \
    --methods standard,chunked-prefill,bounded,headinfer
bench first-token prefill "${llama[@]}" --contexts 10K,100K --repeats 3 \
    --methods "standard,chunked-prefill,bounded,headinfer,$fixed"
bench first-token-400K prefill "${llama[@]}" --contexts 400K --repeats 1 \
    --methods "headinfer,bounded,$fixed"
limit_s=520 bench first-token-800K prefill "${llama[@]}" --contexts 800K --repeats 1 \
    --methods headinfer
# More memory than the claim is about, for the reference that keeps all on the device.
bench suite-llama-prefill-72GiB prefill --model llama-3-8b --dummy-weights --device-memory 72GiB \
    --contexts 10K,20K,40K,100K --methods chunked-prefill,bounded,headinfer
bench suite-small-decode decode --contexts 128K,1M --fill random --device-memory 4GiB \
    --methods "transformers-offloaded,$methods,headinfer"
bench suite-llama-max-context max-context "${llama[@]}" --contexts 10K,800K --fill random \
    --methods standard,transformers-offloaded,head-wise-1,resident
# Half of the heads stream: approximate. 1600K tokens then take 100 GiB. Two parts, of 5 and 7 minutes.
bench sparse decode "${llama[@]}" --contexts 100K,200K,400K,800K,1600K --fill random --new-tokens 20 \
    --methods host-attention,head-wise-sparse
bench sparse-prefill prefill "${llama[@]}" --contexts 100K,400K --repeats 1 \
    --methods host-attention,head-wise-1,head-wise-sparse
limit_s=520 bench sparse-prefill-1M prefill "${llama[@]}" --contexts 1M --repeats 1 \
    --methods head-wise-sparse
# Tables 3 and 5: as many tokens as 128 GiB of CPU memory hold, and half of them before. A minute or two each.
longest() { # model, method, contexts
    bench "longest-$1-$2" max-context --model "$1" --dummy-weights --device-memory 24GiB --fill random \
        --methods "$2" --contexts "$3"
}
longest llama-3-8b head-wise-8 448K,640K
longest llama-2-7b head-wise-1 115K,230K
longest qwen2-7b head-wise-1 1000K,2000K
longest mistral-7b head-wise-1 450K,900K
longest gemma-2-9b head-wise-1 320K,640K
# 128 GiB of KV, so that it needs a machine with more CPU memory than that.
if [ "$(free -g | awk '/^Mem/ {print $2}')" -gt 180 ]; then
    bench 1M decode "${llama[@]}" --contexts 1M --fill random --new-tokens 7 \
        --methods head-wise-1,resident,host-attention
else
    parts+=(1M)
fi

for part in "${wanted[@]}"; do
    if [[ " ${parts[*]} " != *" $part "* ]]; then
        echo "there is no part $part; the parts are: $(printf '%s\n' "${parts[@]}" | awk '!seen[$0]++' | xargs)" >&2
        exit 2
    fi
done
[ -z "${DRY:-}" ] || exit 0
[ -e "$out/gpu-tests.log" ] && tail -n 3 "$out/gpu-tests.log"
grep -E "trial|longest|a token" "$out/gpu.log" | tail -n 40
