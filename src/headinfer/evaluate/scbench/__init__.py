"""SCBench: several questions about one long context, through one cache."""
