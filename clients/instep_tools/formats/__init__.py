"""Files of frames and outputs, a module for each format: its reader and its writer."""
