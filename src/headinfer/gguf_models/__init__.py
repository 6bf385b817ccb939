"""Models in GGUF files, unpacked once into folders that transformers loads as any other.

Two small trained models are known by name, and can be installed from the package index. Any other
GGUF file that transformers reads is taken by its path.
"""

from headinfer.gguf_models.folder import is_gguf_model, model_folder
from headinfer.gguf_models.packaged import PACKAGED

__all__ = ["PACKAGED", "is_gguf_model", "model_folder"]
