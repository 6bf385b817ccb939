"""The package as a whole: importing it, its documents, and the direction of its imports."""

import ast
import contextlib
import functools
import io
import itertools
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import headinfer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headinfer"
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

INSTRUMENTS = ["cli", "evaluate", "bench", "finding", "demo", "probe", "plot", "trace", "estimate"]

# Each may import itself and those further down.
ORDER = [
    "__main__",
    *INSTRUMENTS,
    "server",
    "serving",
    "generation",
    "gguf_models",
    "api",
    "offload",
    "session",
    "integration",
    "engine",
    "attend",
    "products",
    "kv",
    "device",
    "plan",
    "schedule",
    "eight_bits",
    "packed",
    "native",
    "heads",
    "ranks",
    "disk",
    "saved",
    "units",
    "by_context",
    "kept",
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
        if layer in ("estimate", "plan", "units", "errors"):
            assert name.split(".")[0] in ("headinfer", *sys.stdlib_module_names)


@pytest.mark.parametrize("script", ["readme_table.py", "sparsity_report.py", "gpus_tables.py"])
def test_tables_in_documents_are_generated(script: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--check"], check=True)


def test_importing_changes_nothing() -> None:
    program = """
import sys
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface

def state():
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    return (*map(sorted, registries), torch.get_num_threads(), torch.get_default_dtype())

before = state()
import headinfer
headinfer.attach
assert state() == before
assert "headinfer.gguf_models" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_runtime_loads_no_instrument() -> None:
    program = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests")]}
import headinfer.api
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, shared_model

model, tokens = shared_model("llama3"), random_tokens(1, 20)
for device in ("simulated", "cpu"):
    with headinfer.attach(model, device=device):
        model.generate(tokens, max_new_tokens=3)
    list(headinfer.generate(model, tokens, tokenizer=make_tokenizer(VOCAB), device=device,
                            max_new_tokens=3))
print(*(name for name in sys.modules if name.startswith("headinfer.")))
"""
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "headinfer.engine.engine" in loaded
    assert [name for name in loaded if module_layer(name) in INSTRUMENTS] == []


def test_exports_are_few_and_there() -> None:
    assert len(headinfer.__all__) <= 8
    assert all(hasattr(headinfer, name) for name in headinfer.__all__)


def test_readme_is_short_and_its_example_runs() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # as of arguments with new names
        exec(compile(example, "README.md", "exec"), {})
    # The document it is given says nothing of the strongbox, and the model says so.
    assert "unknown." in printed.getvalue()
    assert "prompts pass in chunks of" in printed.getvalue()


@functools.cache
def sources() -> str:
    folders = (ROOT / "src", ROOT / "tests")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return "\n".join(file.read_text() for file in (*files, ROOT / "Makefile"))


@functools.cache
def is_named(name: str) -> bool:
    return name in sources()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_documents_exist(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", text):
        assert is_named(name.split(".")[-1]), f"{path.name} speaks of {name}"
    files = [
        file.as_posix()
        for folder in ("src", "tests", "benchmarks")
        for file in (ROOT / folder).rglob("*.*")
    ]
    for name in re.findall(r"`([\w/]+/\w+\.\w+)`", text):
        assert any(file.endswith(f"/{name}") for file in files), f"{path.name} speaks of {name}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def read_constraints(name: str, python: str) -> dict[str, Version]:
    """The releases that a file names for one Python, each by `==`."""
    releases: dict[str, Version] = {}
    for line in (ROOT / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        if applies(requirement, python):
            assert requirement.name not in releases, f"{requirement.name} is there twice"
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            releases[requirement.name] = Version(specifier.version)
    return releases


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_name_a_release_of_all_that_is_needed(python: str) -> None:
    described = project()
    extras = described["project"]["optional-dependencies"].values()
    needed = described["build-system"]["requires"] + described["project"]["dependencies"]
    releases = read_constraints("constraints.txt", python)
    for requirement in map(Requirement, itertools.chain(needed, *extras)):
        if applies(requirement, python):
            assert requirement.specifier.contains(releases[requirement.name]), requirement
    assert f"Programming Language :: Python :: {python}" in described["project"]["classifiers"]


def test_the_oldest_releases_are_those_the_package_asks_for() -> None:
    releases = read_constraints("constraints-oldest.txt", PYTHONS[0])
    lowest = {}
    for requirement in map(Requirement, project()["project"]["dependencies"]):
        (least,) = (spec for spec in requirement.specifier if spec.operator == ">=")
        lowest[requirement.name] = Version(least.version)
    assert releases == lowest


@pytest.mark.parametrize("target", ["demo", "demo MODEL=smollm2", "test", "lint", "bench"])
def test_make_installs_the_releases_tested_together(target: str) -> None:
    command = ["make", "--dry-run", "--always-make", "--directory", str(ROOT), *target.split()]
    steps = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    installs = [step for step in steps if "pip install" in step]
    assert installs
    assert all("PIP_CONSTRAINT=constraints.txt" in step for step in installs)
