"""What a pass does, as a value: which tokens are kept, fetched and attended, and in which order."""
