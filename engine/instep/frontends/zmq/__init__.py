"""The ZeroMQ front end, the only part that uses ROUTER sockets and wire messages."""
