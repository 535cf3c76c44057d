"""A recorded stream as it was before any of its frames: to look at it, and to continue from there."""
