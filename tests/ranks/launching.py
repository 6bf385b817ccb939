"""Starting two ranks by torchrun, and waiting for them with a limit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_S = 300


def torchrun(*command: str, on_gpus: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command in each of two ranks; none of them outlives the limit."""
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "NCCL_NVLS_ENABLE": "0",  # multicast over NVLink is not allowed everywhere
    }
    if not on_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with subprocess.Popen(
        [*arguments, "--standalone", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def said_by_ranks(stderr: str) -> str:
    """Return what ranks failed with, which torch names the rank in front of; without it, the end.

    Torchrun's own account of a failure is long, and has none of their messages.
    """
    lines = [line for line in stderr.splitlines() if line.startswith("[rank")]
    return "\n".join(lines) or stderr[-4000:]
