"""The Triton programs as Triton's compiler takes them, for GPUs that need not be here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton", allow_module_level=True)

# In a process of its own: in this one the programs may be the interpreter's.
PROGRAM = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from headinfer.attend import triton_chunk, triton_kernels, triton_merge
from headinfer.packed import triton_pages, triton_raw

CONSTANTS = {
    "DIM": 128, "BLOCK_DIM": 128, "BLOCK_ROWS": 16, "BLOCK_TOKENS": 64, "BLOCK_SLOTS": 32,
    "MASKED": False, "MORE": True, "SINKS": True, "WITH_LSE": True, "PLACE": True,
    "APART": True, "COUNTED": True, "LEAST_SPLIT": 256, "QUERY_ROWS": 4, "MERGED_ROWS": 4,
    "CAP": 0.0, "CAUSAL": True, "WINDOW": True,
}
OF_CHUNKS = {"BLOCK_ROWS": 128, "MASKED": True}
OF_PAGES = {"MAX_ESCAPES": 104, "AREA": 320, "BLOCK": 2048, "BLOCK_AREA": 512, "BLOCK_ESCAPES": 128}
OF_FLAGS = {"FLAG_AT": 12290, "FLAG_MASK": 0xFF00, "FLAG": 0x100, "ADDRESS_AT": 12296}
IN_PAGES = {"values": "*i16", "pages": "*u8", "raw": "*u8", "taken": "*i64", "first": "i32"}
TENSORS = "query keys values new_keys new_values out sinks first second third fourth".split()
IN_FLOAT32 = "parts more more_lse lse_out out_lse lses".split()
IN_FLOAT32 += [f"{which}_lse" for which in ("first", "second", "third", "fourth")]
OTHERS = {"mask": "*i1", "arrived": "*i32", "place": "*i64", "counted": "*i64", "scale": "fp32"}
STRIDES = "stride start _batch _head _group _token slot_bytes".split()


def compiled(program, dtype, capability, unaligned, cap=0.0, in_float32=()):
    signature, constants, attributes = {}, {}, {}
    known = CONSTANTS | {"CAP": cap} | (OF_CHUNKS if program is triton_chunk.attend_chunk else {})
    of_pages = program.fn.__module__ in (triton_pages.__name__, triton_raw.__name__)
    known |= OF_PAGES | OF_FLAGS if of_pages else {}
    for position, name in enumerate(program.arg_names):
        if name in known:
            signature[name], constants[position,] = "constexpr", known[name]
            continue
        signature[name] = OTHERS.get(name, "i32")
        if name in TENSORS or name in IN_FLOAT32:
            signature[name] = "*fp32" if name in (*IN_FLOAT32, *in_float32) else f"*{dtype}"
        signature[name] = IN_PAGES.get(name, signature[name]) if of_pages else signature[name]
        pointer = signature[name].startswith("*")
        special = pointer or name.endswith(tuple(STRIDES))
        if special and name not in unaligned and not program.params[position].do_not_specialize:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(program, signature, constants, attributes)
    options = {"num_warps": 8 if program is triton_chunk.attend_chunk else 4}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.asm["cubin"]
    return kernel.asm["ptx"]


dtype, capability = sys.argv[1], int(sys.argv[2])
wide = {}
for module, name in (
    (triton_kernels, "attend_tile"), (triton_kernels, "decode_token"),
    (triton_merge, "merge_slots"), (triton_merge, "merge_few"),
    *([(triton_chunk, "attend_chunk")] if dtype != "fp32" else []),
    *([(triton_pages, "unpack_pages")] if dtype == "bf16" else []),
):
    wide[name] = []
    for unaligned in ((), ("start", "first_token", "page_stride", "values")):
        ptx = compiled(getattr(module, name), dtype, capability, unaligned)
        lines = [line for line in ptx.splitlines() if "global" in line]
        wide[name].append(sum(".v4." in line or ", 0x10, " in line for line in lines))
    if "CAP" in getattr(module, name).arg_names:
        capped = compiled(getattr(module, name), dtype, capability, (), cap=50.0)
        assert capped.count("ex2") > ptx.count("ex2")
# What five partials and more leave: the first is what was merged of the others before.
compiled(triton_merge.merge_few, dtype, capability, (), in_float32=("first",))
if dtype == "bf16":
    compiled(triton_pages.pack_pages, dtype, capability, ())
    compiled(triton_raw.keep_raw_pages, dtype, capability, ())
print(json.dumps(wide))
"""


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param("fp32", 80, marks=pytest.mark.slow),
        pytest.param("fp16", 90, marks=pytest.mark.slow),
        ("bf16", 90),
    ],
)
def test_the_programs_compile_and_read_tiles_in_wide_loads(
    dtype: str, capability: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where a tile begins in its memory is known to be a multiple of 16, as its strides are."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    # What Triton keeps has a name by all it was compiled from, and takes a minute to make.
    cache = getattr(request.config, "cache", None)
    kept = tmp_path if cache is None else cache.mkdir("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), dtype, str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(kept)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    for name, (aligned, unaligned) in json.loads(done.stdout).items():
        if name != "merge_slots":
            assert aligned > unaligned, name
