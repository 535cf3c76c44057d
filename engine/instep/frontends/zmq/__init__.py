"""The ZeroMQ front end: the only place that knows ROUTER sockets and the wire's messages."""
