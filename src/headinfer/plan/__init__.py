"""Pure arithmetic: model shapes, bytes, and the choice of tiles. Never imports torch."""
