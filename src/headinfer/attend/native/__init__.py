"""Attention on the CPU by kernels of our own, in C, compiled where they run."""
