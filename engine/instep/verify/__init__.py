"""Replay recordings and compare, bit for bit."""
