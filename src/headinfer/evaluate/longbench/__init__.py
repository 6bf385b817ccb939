"""LongBench v2: questions of four choices about long texts."""
