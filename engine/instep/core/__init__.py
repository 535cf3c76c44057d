"""Rules over arrays and their compiled kernels: numpy and numba only; no torch, sockets, clock or files."""
