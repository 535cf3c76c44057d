"""The rows of the suite, one comparison a module."""
