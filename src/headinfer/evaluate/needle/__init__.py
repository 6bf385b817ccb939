"""Facts hidden in prose."""
