"""Head patterns: which KV heads of a model need all tokens, and the files that say so."""
