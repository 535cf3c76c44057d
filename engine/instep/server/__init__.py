"""The life of a server process: assembly, loop, reload, shutdown."""
