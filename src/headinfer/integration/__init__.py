"""The only package that knows transformers' internals."""
