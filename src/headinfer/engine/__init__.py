"""Tiles to attention: what is fetched when, what is attended where, and how it merges."""
