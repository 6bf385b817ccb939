"""Honest measurements: every trial in a fresh process, checked against stock transformers.

A parent process that never runs a model (`suite`) starts trials (`trial`). It refuses results that
differ from stock's (`gate`). It sets each beside what the hardware allows (`bound`, `machine`), and
writes rows (`rows`, `table`).
"""
