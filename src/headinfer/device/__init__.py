"""Streams, events, pinned memory and copies, behind one protocol with three implementations."""
