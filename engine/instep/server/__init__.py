"""Sockets, life cycle and the loop between them."""
