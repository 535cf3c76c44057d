"""`top`: a running server in a terminal, over ZeroMQ or HTTP."""
