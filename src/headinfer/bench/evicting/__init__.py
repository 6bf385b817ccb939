"""StreamingLLM and H2O, which drop tokens: reference implementations on stock transformers models.

The paper's Figure 7 has them lose a sentence. They are for comparison alone. Attention is plain
torch, in float32 a few queries at a time, so their speed is not the best that either allows.
"""
