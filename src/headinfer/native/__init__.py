"""Kernels in C: how they are compiled where they run, and the vectors they share."""
