"""Results as a document with plots."""
