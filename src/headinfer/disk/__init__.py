"""The disk below host memory: tokens of running requests that host memory has no room for."""
