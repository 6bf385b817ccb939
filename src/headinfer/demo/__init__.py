"""The embedded demo model and documents to try it on.

The model is a stock Llama whose weights are constructed (see `weights.py`). It answers questions
about numbers hidden in a long text, and can do nothing else.
"""

from headinfer.demo.build import build_model, ensure_model
from headinfer.demo.document import Document, Fact, make_document

__all__ = ["Document", "Fact", "build_model", "ensure_model", "make_document"]
