# What gpu.sh and gpus.sh share; they source it and set `python`. It is no program of its own.

probe_once() { # name of the runs, result, options: as the CPU's share is chosen by it; limit_s: seconds
    local probed="${TMPDIR:-/tmp}/headinfer-$1-probed-$(id -u)" result="$2"
    shift 2
    [ -e "$probed" ] && return
    timeout "${limit_s:-90}" "$python" -m headinfer.cli.main probe --quick "$@" --json "$result" &&
        touch "$probed"
}
