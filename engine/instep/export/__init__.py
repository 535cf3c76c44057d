"""Frames and outputs of a recording as one table, for other tools."""
