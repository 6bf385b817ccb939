# What gpu.sh and gpus.sh share; they source it and set `python`. It is no program of its own.

# A virtual machine's memory is slow where it is first written: 38 GiB took a first trial 6 s.
# So that no method pays for it, four fifths of what is free are written before all of them.
write_memory() {
    timeout 120 "$python" - <<'END'
import torch

free = next(int(line.split()[1]) for line in open("/proc/meminfo") if "MemAvailable" in line)
torch.empty(free * 4 // 5, 1024, dtype=torch.uint8).fill_(1)
END
}

probe_once() { # name of the runs, result, options: as the CPU's share is chosen by it; limit_s: seconds
    local probed="${TMPDIR:-/tmp}/headinfer-$1-probed-$(id -u)" result="$2"
    shift 2
    [ -e "$probed" ] && return
    write_memory
    timeout "${limit_s:-90}" "$python" -m headinfer.cli.main probe --quick "$@" --json "$result" &&
        touch "$probed"
}
