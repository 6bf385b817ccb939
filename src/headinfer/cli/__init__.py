"""The command line: one module a verb. Torch is imported when a verb runs, not before."""
