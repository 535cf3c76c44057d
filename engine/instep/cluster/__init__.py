"""Shards of several machines: the directory, the agent of each node, and the copies of recordings."""
