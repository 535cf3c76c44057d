"""Pure rules: numpy and the standard library only; no torch, sockets, clock or files."""
