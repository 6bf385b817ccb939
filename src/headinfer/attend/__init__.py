"""Partial attention: an output and its log-sum-exp for any set of keys, and how partials merge."""
