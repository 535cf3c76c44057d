"""The demonstrations that ship with the package."""
