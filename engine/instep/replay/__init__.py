"""Stepping recorded frames again: to continue a recording, to verify it, and to go back in it."""
