"""The engine: frames in, steps, outputs out. It knows no sockets, no wire format and no front end."""
