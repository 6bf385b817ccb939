"""Several clients of one model: requests that take turns, prefixes that are kept, admission."""
