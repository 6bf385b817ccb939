"""Plots. matplotlib is optional: only `style` and the modules that draw import it."""
