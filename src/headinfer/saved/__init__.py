"""Saved sessions: a folder of safetensors files and an index, written and read in large blocks."""
