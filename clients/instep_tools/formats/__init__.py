"""File formats of frames and outputs: a module with the reader and the writer of each."""
