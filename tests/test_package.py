"""The package as a whole: importing it, its documents, and the direction of its imports."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headinfer
from headinfer.integration.calls import cache_name
from tiny_models import shared_model

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headinfer"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Each may import itself and those further down.
ORDER = [
    "cli",
    "bench",
    "demo",
    "probe",
    "plot",
    "trace",
    "api",
    "integration",
    "engine",
    "attend",
    "store",
    "device",
    "plan",
    "units",
    "folders",
    "checked_files",
    "scratch",
    "errors",
]


def module_layer(name: str) -> str:
    return name.split(".")[1] if "." in name else "api"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downwards(path: Path) -> None:
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    for name in imported:
        if name.split(".")[0] == "headinfer":
            assert ORDER.index(module_layer(name)) >= ORDER.index(layer), f"{path} imports {name}"
        if layer in ("plan", "units", "errors"):
            assert name.split(".")[0] in ("headinfer", *sys.stdlib_module_names)


def test_the_readmes_table_is_generated() -> None:
    script = ROOT / "benchmarks" / "readme_table.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def test_importing_changes_nothing() -> None:
    program = """
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface

def state():
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    return (*map(sorted, registries), torch.get_num_threads(), torch.get_default_dtype())

before = state()
import headinfer
headinfer.attach
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_exports_are_few_and_there() -> None:
    assert len(headinfer.__all__) <= 8
    assert all(hasattr(headinfer, name) for name in headinfer.__all__)


def test_readme_is_short_and_its_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    # Before transformers 5.24 the cache has another name, as the example says.
    example = example.replace("cache=cache", f"{cache_name(shared_model('llama3'))}=cache")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    # The document it is given says nothing of the strongbox, and the model says so.
    assert "unknown." in printed.getvalue()
    assert "KV heads" in printed.getvalue()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_documents_exist(path: Path) -> None:
    sources = (
        "\n".join(
            file.read_text()
            for folder in ("src", "tests")
            for file in (ROOT / folder).rglob("*.py")
        )
        + (ROOT / "Makefile").read_text()
    )
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        assert name.split(".")[-1] in sources, f"{path.name} speaks of {name}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
