"""Ctrl-C that nobody catches, in the middle of a model's call: the process ends with one traceback.

The signal is a real one, sent by the model to itself at a place that is known.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
sys.modules["tabulate"] = None  # torch imports it at the exit, and Python forgets the signal
import torch
import headinfer
from tiny_models import random_tokens, tiny_model

torch.set_num_threads(1)
model = tiny_model("llama3")
for number, (device, decode, kept) in enumerate(eval(sys.argv[1])):
    child = os.fork()
    if not child:
        break
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGINT, (number, status)
else:
    sys.exit()

error = os.open(f"stderr{number}", os.O_WRONLY | os.O_CREAT)
os.dup2(error, 2)
calls = 0

def interrupt(*_):
    global calls
    calls += 1
    if calls == (9 if decode else 4):  # the prompt takes five
        os.kill(os.getpid(), signal.SIGINT)

def generate(offload):
    cache = offload.new_cache()
    model.generate(random_tokens(1, 80), past_key_values=cache, max_new_tokens=20)

model.model.layers[1].mlp.register_forward_hook(interrupt)
offload = headinfer.attach(
    model, device=device, chunk_tokens=16, tile_tokens=8, resident_tokens=20 * (device != "cpu"),
    host_attention=0.5 if device != "cpu" else "off",
)
if kept == "module":
    cache = offload.new_cache()
    model.generate(random_tokens(1, 80), past_key_values=cache, max_new_tokens=20)
elif kept == "function":
    generate(offload)
else:
    with offload:
        generate(offload)
"""

QUICK = [("cpu", False, "function"), ("simulated", True, "with")]
OTHERS = [
    ("cpu", True, "module"),
    ("simulated", False, "module"),
    ("simulated", True, "module"),
    ("simulated", True, "function"),
]
"""Cases: the device, whether it is in a step of decoding, and who holds the cache by then."""


@pytest.mark.parametrize(
    "cases",
    [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow)],
    ids=["some", "others"],
)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="one import of torch serves all cases")
def test_an_interrupted_process_prints_one_traceback(
    cases: list[tuple[str, bool, str]], tmp_path: Path
) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, repr(cases)],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    files = sorted(tmp_path.glob("stderr*"))
    assert len(files) == len(cases)
    for file in files:
        printed = file.read_text()
        assert printed.rstrip().endswith("KeyboardInterrupt"), printed
        assert printed.count("Traceback") == 1, printed
        assert "ignored" not in printed, printed
