"""Streaming inference for recurrent networks: the server side."""
