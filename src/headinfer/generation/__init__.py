"""A prompt's answer as text: from a model by name, its prompt and settings, to records of it."""
