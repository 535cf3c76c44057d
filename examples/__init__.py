"""Trained networks of packages from PyPI, served with instep: `python -m examples NAME`."""
