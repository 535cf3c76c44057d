"""The producer's side of instep: numpy, pyzmq and msgpack, never torch."""
