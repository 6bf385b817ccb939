"""Processes that compute one model together, each with its own KV heads."""
