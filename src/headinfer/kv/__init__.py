"""The KV cache as tiles: which tokens lie where, and the memory they lie in."""
